// The calibrate walk: a float model folder and text in, a MoBiQuant checkpoint folder out. Fits the
// blocks in order, samples what routers learn from, trains them, measures the price table, writes.
// The output folder appears whole or not at all.
#ifndef MOBI_CALIBRATOR_CALIBRATE_H_
#define MOBI_CALIBRATOR_CALIBRATE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "calibrator/block_calibration.h"
#include "calibrator/progress.h"
#include "calibrator/router_training.h"
#include "calibrator/routing_samples.h"
#include "calibrator/text_data.h"
#include "engine/base/clock.h"

namespace mobi {

struct RoutingOptions {
  int64_t sample_sequences = 16;  // for training routers, and a coherent batch for prices
  int64_t price_tokens = 256;     // of each sequence, run once per price
  double byte_share = 0.04;       // router bytes beside what a token reads at `byte_share_bits`
  double byte_share_bits = 3;
  int max_hidden = 32;
  RoutingSampleOptions samples;
  RouterTrainingOptions training;
};

struct CalibrateOptions {
  std::string model_dir;
  std::vector<std::string> data_paths;
  TextLayout layout = TextLayout::kPlain;
  std::string output_dir;
  bool overwrite = false;
  int64_t num_samples = 128;
  int64_t seq_len = 0;  // 0: 1024, or the model's context when that is shorter
  uint64_t seed = 1;
  int num_threads = 1;
  BlockCalibrationOptions blocks;
  RoutingOptions routing;
};

// INVALID_ARGUMENT and its like name what is wrong with model, text or output folder.
absl::Status Calibrate(const CalibrateOptions& options, const Clock& clock, std::FILE* progress_out,
                       bool progress_is_terminal);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_CALIBRATE_H_
