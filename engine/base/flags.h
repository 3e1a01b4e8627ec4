// Command lines of our programs: absl flags, filled from the environment and then from argv, with
// errors as a Status so that a main can print one line and exit with code 2 (absl's own parser
// exits with 1). Used by mains only; everything below them gets option structs. Flags that several
// programs share stand in a NAME_flags.cc and belong to every program that links it.
#ifndef MOBI_ENGINE_BASE_FLAGS_H_
#define MOBI_ENGINE_BASE_FLAGS_H_

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace mobi {

// Exit codes of every program of ours.
inline constexpr int kExitFailure = 1;  // the operation failed
inline constexpr int kExitUsage = 2;    // bad flag, folder or file

// Sets the flags defined in `main_file` (give __FILE__) and in NAME_flags.cc files, and returns the
// positional arguments.
// Forms:
// --name=value, --name value, --name and --noname for booleans; "--" ends the flags. A flag that is
// not given takes the environment variable ENV_PREFIX + NAME when that is set ("" turns this off).
// INVALID_ARGUMENT: one line that names the flag and the reason.
absl::StatusOr<std::vector<std::string>> ParseFlags(int argc, char** argv,
                                                    std::string_view main_file,
                                                    std::string_view env_prefix = "");

// "  --name (default): help" of every flag that ParseFlags would set, by name.
std::string FlagsHelp(std::string_view main_file);

// Where argv asks for --help or -h: prints `usage` and these flags, and returns true.
bool PrintedHelp(int argc, char** argv, std::string_view usage, std::string_view main_file);

}  // namespace mobi

#endif  // MOBI_ENGINE_BASE_FLAGS_H_
