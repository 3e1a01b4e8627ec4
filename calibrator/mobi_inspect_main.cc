// mobi-inspect DIR: what a model folder holds, and whether it is sound.
#include <cstdio>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/status/statusor.h"
#include "calibrator/inspect.h"
#include "engine/base/flags.h"
#include "engine/base/status_macros.h"

ABSL_FLAG(bool, json, false, "Print one JSON object.");
ABSL_FLAG(bool, verify, true, "Read everything: checksums of MANIFEST, finite scales and routers.");

namespace mobi {
namespace {

constexpr char kUsage[] =
    "mobi-inspect DIR [--json] [--noverify]\n"
    "Tells what a model folder holds and checks that it is sound.\n";

absl::Status Run(int argc, char** argv) {
  MOBI_ASSIGN_OR_RETURN(const std::vector<std::string> arguments, ParseFlags(argc, argv, __FILE__));
  if (arguments.size() != 1) {
    return absl::InvalidArgumentError("one model folder is needed, see mobi-inspect --help");
  }
  MOBI_ASSIGN_OR_RETURN(const FolderReport report,
                        InspectFolder(arguments[0], absl::GetFlag(FLAGS_verify)));
  const std::string text =
      absl::GetFlag(FLAGS_json) ? ReportAsJson(report).dump(2) + "\n" : ReportAsText(report);
  if (fwrite(text.data(), 1, text.size(), stdout) != text.size() || fflush(stdout) != 0) {
    return absl::UnavailableError("standard output cannot be written");
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace mobi

int main(int argc, char** argv) {
  if (mobi::PrintedHelp(argc, argv, mobi::kUsage, __FILE__)) return 0;
  const absl::Status status = mobi::Run(argc, argv);
  if (status.ok()) return 0;
  fprintf(stderr, "mobi-inspect: %s\n", std::string(status.message()).c_str());
  return mobi::kExitUsage;
}
