// Every limit on what a client may send or hold, with its default and why it is there. Filled from
// flags by the main, read-only afterwards; GetModel tells clients the ones they meet.
#ifndef MOBI_SERVER_LIMITS_H_
#define MOBI_SERVER_LIMITS_H_

#include <chrono>
#include <cstddef>

#include "engine/base/clock.h"
#include "kernels/backend.h"

namespace mobi {

struct RequestLimits {
  int max_prompt_bytes = 512 << 10;  // of text or chat; tokenizing is linear in it
  int max_chat_messages = 1024;
  int max_new_tokens = 4096;
  int default_max_new_tokens = 256;
  int max_n = 4;  // completions multiply KV blocks
  int max_logprobs = kMaxTopLogprobs;
  int max_prompt_logprobs = kMaxTopLogprobs;
  int max_prompt_scores = 1 << 17;  // logprobs of a prompt, alternatives included: 3 MiB or so
  int max_stop_strings = 8;         // each is searched for in every token's text
  int max_stop_bytes = 64;
  int max_stop_ids = 8;
  int max_logit_bias = 300;
  int max_request_id_bytes = 128;
  int max_tenant_bytes = 64;
  int max_cache_salt_bytes = 128;
  Duration max_deadline = std::chrono::minutes(10);  // also of calls without a deadline
};

struct StreamLimits {
  // Unread output that a call may hold; past it the request ends with RESOURCE_EXHAUSTED.
  size_t max_outbox_bytes = 64 << 10;
  // A write that the client's flow control blocks for so long ends the call.
  Duration max_write_stall = std::chrono::seconds(30);
  // What RetryInfo advises.
  Duration retry_after_overload = std::chrono::seconds(1);
  Duration retry_after_unavailable = std::chrono::seconds(2);
};

// Of the transport. gRPC 1.51 has no limit on connections and does not bound every HTTP/2 abuse:
// put a front proxy before it where clients are not trusted.
struct TransportLimits {
  int max_message_bytes = 1 << 20;
  int max_metadata_bytes = 8 << 10;
  int max_streams_per_connection = 64;
  size_t memory_quota_bytes = 256 << 20;  // gRPC's buffers, over all connections
  Duration max_connection_idle = std::chrono::minutes(15);
  Duration max_connection_age = std::chrono::minutes(30);  // lets load balancers even out
  Duration max_connection_age_grace = std::chrono::minutes(10);
  Duration keepalive_time = std::chrono::seconds(30);  // finds dead peers
  Duration keepalive_timeout = std::chrono::seconds(10);
  Duration min_ping_interval = std::chrono::seconds(10);  // clients that ping faster are cut off
};

}  // namespace mobi

#endif  // MOBI_SERVER_LIMITS_H_
