#include "engine/base/flags.h"

#include <cstdio>
#include <cstdlib>
#include <map>

#include "absl/flags/reflection.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace mobi {
namespace {

// The packaged Abseil has a string_view of its own.
absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

// absl normalises file names, so only the tails are compared.
std::string BaseName(std::string_view path) {
  const size_t slash = path.rfind('/');
  return std::string(slash == path.npos ? path : path.substr(slash + 1));
}

std::map<std::string, absl::CommandLineFlag*, std::less<>> FlagsOf(std::string_view main_file) {
  std::map<std::string, absl::CommandLineFlag*, std::less<>> flags;
  for (const auto& [name, flag] : absl::GetAllFlags()) {
    const std::string file = BaseName(flag->Filename());
    if (file == BaseName(main_file) || absl::EndsWith(file, "_flags.cc")) {
      flags.emplace(std::string(name), flag);
    }
  }
  return flags;
}

absl::Status Assign(absl::CommandLineFlag& flag, std::string_view value, std::string_view source) {
  std::string error;
  if (flag.ParseFrom(View(value), &error)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(View(source), ": ", error));
}

absl::Status AssignFromEnvironment(absl::CommandLineFlag& flag, std::string_view prefix) {
  const std::string name = absl::StrCat(View(prefix), absl::AsciiStrToUpper(flag.Name()));
  const char* value = std::getenv(name.c_str());
  return value == nullptr ? absl::OkStatus() : Assign(flag, value, name);
}

bool WantsHelp(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument == "--") return false;
    if (argument == "--help" || argument == "-h" || argument == "-help") return true;
  }
  return false;
}

}  // namespace

absl::StatusOr<std::vector<std::string>> ParseFlags(int argc, char** argv,
                                                    std::string_view main_file,
                                                    std::string_view env_prefix) {
  const auto flags = FlagsOf(main_file);
  if (!env_prefix.empty()) {
    for (const auto& [name, flag] : flags) {
      if (auto status = AssignFromEnvironment(*flag, env_prefix); !status.ok()) return status;
    }
  }
  std::vector<std::string> positional;
  for (int i = 1; i < argc; ++i) {
    std::string_view argument = argv[i];
    if (argument == "--") {
      positional.insert(positional.end(), argv + i + 1, argv + argc);
      break;
    }
    if (argument.size() < 2 || argument[0] != '-' || absl::ascii_isdigit(argument[1])) {
      positional.emplace_back(argument);  // a word, "-" or a negative number
      continue;
    }
    argument.remove_prefix(argument[1] == '-' ? 2 : 1);
    const size_t equals = argument.find('=');
    std::string name(argument.substr(0, equals));
    for (char& c : name) c = c == '-' ? '_' : c;
    const std::string shown = absl::StrCat("--", View(argument.substr(0, equals)));
    auto flag = flags.find(name);
    bool negated = false;
    if (flag == flags.end() && name.compare(0, 2, "no") == 0) {
      flag = flags.find(std::string_view(name).substr(2));
      negated = flag != flags.end() && flag->second->IsOfType<bool>();
      if (!negated) flag = flags.end();
    }
    if (flag == flags.end()) {
      return absl::InvalidArgumentError(absl::StrCat(shown, ": unknown flag, see --help"));
    }
    std::string_view value;
    if (equals != argument.npos) {
      if (negated) return absl::InvalidArgumentError(absl::StrCat(shown, ": takes no value"));
      value = argument.substr(equals + 1);
    } else if (flag->second->IsOfType<bool>()) {
      value = negated ? "false" : "true";
    } else if (++i < argc) {
      value = argv[i];
    } else {
      return absl::InvalidArgumentError(absl::StrCat(shown, ": needs a value"));
    }
    if (auto status = Assign(*flag->second, value, shown); !status.ok()) return status;
  }
  return positional;
}

std::string FlagsHelp(std::string_view main_file) {
  std::string help;
  for (const auto& [name, flag] : FlagsOf(main_file)) {
    const std::string value = flag->DefaultValue();
    absl::StrAppend(&help, "  --", name, value.empty() ? "" : absl::StrCat(" (", value, ")"), ": ",
                    flag->Help(), "\n");
  }
  return help;
}

bool PrintedHelp(int argc, char** argv, std::string_view usage, std::string_view main_file) {
  if (!WantsHelp(argc, argv)) return false;
  std::printf("%s\nFlags:\n%s", std::string(usage).c_str(), FlagsHelp(main_file).c_str());
  return true;
}

}  // namespace mobi
