// Tells a person how far a long job is: one line that rewrites itself with the time left on a
// terminal, plain lines elsewhere. Belongs to one thread.
#ifndef MOBI_CALIBRATOR_PROGRESS_H_
#define MOBI_CALIBRATOR_PROGRESS_H_

#include <cstdio>
#include <string>
#include <string_view>

#include "engine/base/clock.h"

namespace mobi {

class Progress {
 public:
  // `total` in units of work; `clock` and `out` outlive it.
  Progress(double total, const Clock& clock, std::FILE* out, bool is_terminal);
  ~Progress();

  // `units` more are done, and `what` was the piece.
  void Advance(double units, std::string_view what);
  double elapsed_seconds() const;

 private:
  const double total_;
  const Clock& clock_;
  std::FILE* const out_;
  const bool is_terminal_;
  const TimePoint start_;
  double done_ = 0;
};

// "1h02m", "3m07s", "12s".
std::string ShortDuration(double seconds);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_PROGRESS_H_
