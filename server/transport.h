// gRPC servers hardened the same way: what arguments, quotas and plugins a port gets.
#ifndef MOBI_SERVER_TRANSPORT_H_
#define MOBI_SERVER_TRANSPORT_H_

#include "grpcpp/server_builder.h"
#include "server/limits.h"

namespace mobi {

enum class PortKind { kData, kAdmin };

// Health and reflection on every port, channelz on the admin port only. Affects builders made
// afterwards; call it once per process before the first of them.
void EnableTransportPlugins();

// `tokens`: callers need one. Reflection and channelz, which are the library's and ask for none,
// are then left out; health stays open.
void Harden(const TransportLimits& limits, PortKind kind, bool tokens,
            grpc::ServerBuilder& builder);

}  // namespace mobi

#endif  // MOBI_SERVER_TRANSPORT_H_
