// Where a checkpoint's error and bits are, linear by linear: the output error that every level
// leaves on real text, the bits that tokens read at given targets, and how far the worst tokens of
// one level are the worst of another (outlier migration, MoBiQuant's figure of the same name).
// Runs the float model's blocks and the checkpoint's side by side on the host.
#ifndef MOBI_CALIBRATOR_LAYER_REPORT_H_
#define MOBI_CALIBRATOR_LAYER_REPORT_H_

#include <array>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "calibrator/text_data.h"
#include "kernels/bit_slice.h"

namespace mobi {

struct LayerReportOptions {
  std::string model_dir;  // the checkpoint
  std::string float_dir;  // what it was made from
  std::string data_path;
  TextLayout layout = TextLayout::kPlain;
  std::vector<float> bits;
  int window = 1024;
  int windows = 4;  // from the start of the text
  int num_threads = 1;
};

struct LinearReport {
  std::string name;
  // Mean of |(W_k - W) x|^2 over the mean of |W x|^2, levels 1..4.
  std::array<double, kNumLevels> error{};
  // [a][b]: share of the worst tenth of tokens at level a + 1 that are so at level b + 1.
  std::array<std::array<double, kNumLevels>, kNumLevels> overlap{};
  std::vector<double> bits;  // one per target, token mode
};

absl::StatusOr<std::vector<LinearReport>> ReportLayers(const LayerReportOptions& options);

// The share of `a`'s largest tenth that is among `b`'s; equal sizes, at least ten values.
double WorstTenthOverlap(const std::vector<float>& a, const std::vector<float>& b);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_LAYER_REPORT_H_
