// The calibrate walk: a float model folder and text in, a MoBiQuant checkpoint folder out. Fits the
// blocks in order, tunes their pairs end to end, fits lm_head if it goes in slices, trains routers
// on samples of what is left, measures the price table, writes. The output folder appears whole or
// not at all.
#ifndef MOBI_CALIBRATOR_CALIBRATE_H_
#define MOBI_CALIBRATOR_CALIBRATE_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "calibrator/progress.h"
#include "calibrator/recipe.h"
#include "calibrator/text_data.h"
#include "engine/base/clock.h"

namespace mobi {

struct CalibrateOptions {
  std::string model_dir;
  std::vector<std::string> data_paths;
  TextLayout layout = TextLayout::kPlain;
  std::string output_dir;
  bool overwrite = false;
  int64_t num_samples = 320;
  int64_t seq_len = 0;  // 0: 1024, or the model's context when that is shorter
  uint64_t seed = 1;
  int num_threads = 1;
  Recipe recipe;
  // Asked between steps; true ends the run with CANCELLED. What is finished stays in
  // OUTPUT_DIR.progress, and the same call goes on behind it.
  std::function<bool()> interrupted;
};

// INVALID_ARGUMENT and its like name what is wrong with model, text or output folder.
absl::Status Calibrate(const CalibrateOptions& options, const Clock& clock, std::FILE* progress_out,
                       bool progress_is_terminal);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_CALIBRATE_H_
