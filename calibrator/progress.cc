#include "calibrator/progress.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"

namespace mobi {

std::string ShortDuration(double seconds) {
  const auto s = static_cast<int64_t>(std::llround(std::max(seconds, 0.0)));
  if (s >= 3600) return absl::StrFormat("%dh%02dm", s / 3600, s / 60 % 60);
  if (s >= 60) return absl::StrFormat("%dm%02ds", s / 60, s % 60);
  return absl::StrFormat("%ds", s);
}

Progress::Progress(double total, const Clock& clock, std::FILE* out, bool is_terminal)
    : total_(total), clock_(clock), out_(out), is_terminal_(is_terminal), start_(clock.Now()) {}

Progress::~Progress() {
  if (is_terminal_ && done_ > 0) std::fputc('\n', out_);
}

double Progress::elapsed_seconds() const { return ToSeconds(clock_.Now() - start_); }

void Progress::Advance(double units, std::string_view what) {
  done_ += units;
  const double elapsed = elapsed_seconds(), share = std::min(done_ / total_, 1.0);
  const std::string line = absl::StrFormat(
      "%3.0f %%  %s, %s, %s left", 100 * share, std::string(what), ShortDuration(elapsed),
      ShortDuration(share > 0 ? elapsed * (1 - share) / share : 0));
  if (is_terminal_) {
    std::fprintf(out_, "\r%-79s", line.c_str());
  } else {
    std::fprintf(out_, "%s\n", line.c_str());
  }
  std::fflush(out_);
}

}  // namespace mobi
