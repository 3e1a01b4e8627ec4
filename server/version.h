// The version that clients, metrics and --version show: CMake's.
#ifndef MOBI_SERVER_VERSION_H_
#define MOBI_SERVER_VERSION_H_

namespace mobi {

inline constexpr char kServerVersion[] = MOBI_VERSION;

}  // namespace mobi

#endif  // MOBI_SERVER_VERSION_H_
