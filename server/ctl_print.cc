#include "server/ctl_print.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "google/protobuf/util/json_util.h"

namespace mobi {
namespace {

// 256-colour codes from 2 to 8 bits.
constexpr int kBitColors[] = {196, 208, 220, 190, 118, 84, 48};

int ColorOf(float bits) {
  const int index = std::clamp(static_cast<int>(std::lround(bits)) - 2, 0, 6);
  return kBitColors[index];
}

absl::Time TimeOf(const google::protobuf::Timestamp& time) {
  return absl::FromUnixNanos(time.seconds() * 1'000'000'000 + time.nanos());
}

std::string ClockTime(const google::protobuf::Timestamp& time) {
  return absl::FormatTime("%H:%M:%S", TimeOf(time), absl::LocalTimeZone());
}

std::string DescribeMode(const v1::PrecisionStatus& status) {
  switch (status.mode()) {
    case v1::PRECISION_MODE_OVERRIDE: {
      const absl::Duration left = TimeOf(status.override_until()) - TimeOf(status.time());
      return absl::StrFormat("override until %s, %.0f s left", ClockTime(status.override_until()),
                             std::max(0.0, absl::ToDoubleSeconds(left)));
    }
    case v1::PRECISION_MODE_POLICY:
      return "policy";
    default:
      return "fixed";
  }
}

// "  queue_depth 0.40, kv_usage 0.12": pressure by signal; "?" where there is no value.
std::string DescribeSignals(const v1::PrecisionStatus& status) {
  std::string text;
  for (const v1::SignalPressure& signal : status.signals()) {
    absl::StrAppendFormat(&text, "%s%s %.2f%s", text.empty() ? "  " : ", ", signal.name(),
                          signal.pressure(), signal.stale() ? "?" : "");
  }
  return text;
}

// Zeros are printed too. Protobuf 26, which later gRPC comes with, renamed the option.
template <typename Options>
void PrintZeros(Options& options) {
  if constexpr (requires { options.always_print_primitive_fields; }) {
    options.always_print_primitive_fields = true;
  } else {
    options.always_print_fields_with_no_presence = true;
  }
}

}  // namespace

std::string ToJson(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  PrintZeros(options);
  std::string json;
  const auto status = google::protobuf::util::MessageToJsonString(message, &json, options);
  return status.ok() ? json : absl::StrCat("{\"error\":\"", status.ToString(), "\"}");
}

void TextPrinter::Print(const v1::GenerateResponse& message) {
  Write(message.prompt().text(), 0);
  for (const v1::Chunk& chunk : message.chunks()) {
    if (chunk.index() == 0) text_ += chunk.text();
    if (chunk.token_ids_size() > 0) {
      if (first_bits_ == 0) first_bits_ = chunk.effective_bits();
      last_bits_ = chunk.effective_bits();
    }
    if (num_completions_ > 1 && chunk.index() != last_index_ && !chunk.text().empty()) {
      End();
      std::printf("[%d] ", chunk.index());
      last_index_ = chunk.index();
    }
    Write(chunk.text(), chunk.effective_bits());
  }
  std::fflush(stdout);
}

void TextPrinter::Write(const std::string& text, float bits) {
  if (text.empty()) return;
  if (color_ && bits > 0) {
    std::printf("\x1b[38;5;%dm%s\x1b[0m", ColorOf(bits), text.c_str());
  } else {
    std::fwrite(text.data(), 1, text.size(), stdout);
  }
  at_line_start_ = text.back() == '\n';
}

void TextPrinter::End() {
  if (!at_line_start_) std::printf("\n");
  at_line_start_ = true;
  std::fflush(stdout);
}

std::string DescribeSummary(const v1::Summary& summary, const TextPrinter& printer) {
  const v1::Usage& usage = summary.usage();
  const v1::Timings& timings = summary.timings();
  const double seconds = timings.total_ms() / 1e3;
  std::vector<std::string> reasons;
  for (const int reason : summary.finish_reasons()) {
    reasons.push_back(reason == v1::FINISH_REASON_LENGTH ? "length" : "stop");
  }
  std::string text = absl::StrFormat("-- %d prompt tokens", usage.prompt_tokens());
  if (usage.cached_tokens() > 0) absl::StrAppend(&text, " (", usage.cached_tokens(), " cached)");
  absl::StrAppendFormat(&text, ", %d new in %.2f s (%.1f tokens/s), ended by %s\n",
                        usage.completion_tokens(), seconds,
                        seconds > 0 ? usage.completion_tokens() / seconds : 0.0,
                        absl::StrJoin(reasons, ", "));
  absl::StrAppendFormat(&text, "-- queue %.1f ms, prefill %.1f ms, decode %.1f ms",
                        timings.queue_ms(), timings.prefill_ms(), timings.decode_ms());
  absl::StrAppendFormat(&text, "; effective bits %.2f", summary.mean_effective_bits());
  if (usage.completion_tokens() > 0) {
    absl::StrAppendFormat(&text, " (first %.2f, last %.2f)", printer.first_bits(),
                          printer.last_bits());
  }
  return text + "\n";
}

std::string DescribeModel(const v1::GetModelResponse& model) {
  const v1::Architecture& shape = model.architecture();
  const v1::Limits& limits = model.limits();
  std::string text = absl::StrFormat(
      "%s  %.1fM parameters, %s\n", model.name(),
      static_cast<double>(shape.num_parameters()) * 1e-6,
      model.elastic()
          ? absl::StrFormat("elastic, %g to %g bits", model.min_bits(), model.max_bits())
          : absl::StrFormat("float, %g bits", model.max_bits()));
  absl::StrAppendFormat(&text, "  %d layers of %d, %d heads (%d KV), vocabulary %d\n",
                        shape.num_hidden_layers(), shape.hidden_size(), shape.num_attention_heads(),
                        shape.num_key_value_heads(), shape.vocab_size());
  absl::StrAppendFormat(&text, "  context %d, at most %d new tokens, %s\n", limits.max_model_len(),
                        limits.max_new_tokens(),
                        model.has_chat_template() ? "text and chat" : "text");
  absl::StrAppendFormat(&text, "  classes: %s\n", absl::StrJoin(model.priority_classes(), ", "));
  absl::StrAppendFormat(&text, "  on %s: %s, server %s\n", model.backend(), model.device(),
                        model.server_version());
  return text;
}

std::string DescribeStatus(const v1::PrecisionStatus& status) {
  const v1::LoadStatus& load = status.load();
  std::string text = absl::StrFormat("state      %s\n", load.draining() ? "draining"
                                                        : load.ready()  ? "ready"
                                                                        : "not ready");
  absl::StrAppendFormat(&text, "precision  target %.2f, effective %.2f, loaded %.2f bits (%s)%s\n",
                        status.target_bits(), status.effective_bits(), status.loaded_bits(),
                        DescribeMode(status),
                        status.elastic() ? "" : "; this model has one precision");
  absl::StrAppendFormat(&text, "window     %s: %g to %g bits, policy generation %d\n",
                        status.window(), status.floor_bits(), status.ceiling_bits(),
                        status.policy_generation());
  if (status.elastic()) {
    absl::StrAppendFormat(
        &text,
        "resident   %d bits in %.1f MiB; %d KV blocks lent, slices left %d and returned %d times\n",
        status.resident_bits(), static_cast<double>(status.resident_slice_bytes()) / (1 << 20),
        status.lent_kv_blocks(), status.slice_drops(), status.slice_restores());
  }
  absl::StrAppendFormat(&text, "price      %.3g loss/byte, trim %+.3f%s\n", status.price(),
                        status.log_price_trim(), status.saturated() ? ", saturated" : "");
  if (!status.signals().empty()) {
    absl::StrAppendFormat(&text, "pressure   %.2f:%s\n", status.pressure(),
                          DescribeSignals(status));
  }
  absl::StrAppendFormat(&text, "load       %d running, %d waiting (%d tokens), KV %.1f %% used\n",
                        load.running_requests(), load.waiting_requests(), load.waiting_tokens(),
                        load.kv_cache_usage() * 100);
  absl::StrAppendFormat(&text, "speed      %.1f tokens/s, %.1f prompt tokens/s, step %.2f ms\n",
                        load.tokens_per_second(), load.prompt_tokens_per_second(), load.step_ms());
  absl::StrAppendFormat(&text, "latency    first token %.1f ms, between tokens %.1f ms (p95)\n",
                        load.ttft_p95_ms(), load.itl_p95_ms());
  return text;
}

std::string WatchHeading() {
  return absl::StrFormat("%8s  %6s  %9s  %6s  %8s  %7s  %7s  %5s  %8s  %7s  %8s  %7s  %s\n", "time",
                         "target", "effective", "loaded", "pressure", "running", "waiting", "KV %",
                         "tokens/s", "step ms", "ttft p95", "itl p95", "mode, pressure by signal");
}

std::string WatchRow(const v1::PrecisionStatus& status) {
  const v1::LoadStatus& load = status.load();
  return absl::StrFormat(
      "%8s  %6.2f  %9.2f  %6.2f  %8.2f  %7d  %7d  %5.1f  %8.1f  %7.2f  %8.1f  %7.1f  %s%s\n",
      ClockTime(status.time()), status.target_bits(), status.effective_bits(), status.loaded_bits(),
      status.pressure(), load.running_requests(), load.waiting_requests(),
      load.kv_cache_usage() * 100, load.tokens_per_second(), load.step_ms(), load.ttft_p95_ms(),
      load.itl_p95_ms(), DescribeMode(status), DescribeSignals(status));
}

}  // namespace mobi
