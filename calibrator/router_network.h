// What routers and gates have in common while they are trained: standardised inputs, a two-layer
// network with Adam, batches in a drawn order, and the way back to raw inputs. Sits below
// router_training.h and gate_training.h; deterministic for a seed, nothing here is shared between
// threads.
#ifndef MOBI_CALIBRATOR_ROUTER_NETWORK_H_
#define MOBI_CALIBRATOR_ROUTER_NETWORK_H_

#include <cstdint>
#include <random>
#include <vector>

#include "absl/functional/function_ref.h"
#include "calibrator/linear_algebra.h"
#include "calibrator/matrix.h"

namespace mobi {

// A router on the host. w1 holds values that fp16 holds exactly.
struct RouterWeights {
  Matrix w1;  // [num_hidden, cols]
  std::vector<float> b1;
  std::vector<float> u;
  Matrix w2;  // [segments * kNumLevels, num_hidden]
  std::vector<float> b2;

  int num_hidden() const { return static_cast<int>(w1.rows()); }
};

struct RouterTrainingOptions {
  int num_hidden = 8;
  int epochs = 20;
  int batch = 256;
  float learning_rate = 1e-2f;
  uint64_t seed = 1;
};

float Sigmoid(float x);
// A normal draw by Box and Muller: the library's own differs between implementations.
float Normal(std::mt19937_64& random);
// Log of the root mean square.
float LogRms(const float* x, int64_t cols);

// A router's inputs in a drawn order of tokens, so that a batch is whole rows, which products find
// on the device. Channels are brought to unit size; one more column carries the log of the rms,
// brought to zero mean and unit size.
class RouterInputs {
 public:
  RouterInputs(const Matrix& inputs, std::mt19937_64& random);

  int64_t tokens() const { return values_.get().rows(); }
  int64_t cols() const { return values_.get().cols(); }
  ConstMatrixView Rows(int64_t begin, int64_t count) const {
    return ConstMatrixView(values_.get()).Rows(begin, count);
  }
  // Which tokens these rows are.
  const int64_t* Order() const { return order_.data(); }
  // Fills w1, b1 and u of a router that sees raw inputs from a first layer that saw these.
  void Unstandardise(const Matrix& w1, const Matrix& b1, RouterWeights& router) const;

 private:
  std::vector<int64_t> order_;       // [tokens]
  KeptMatrix values_;                // [tokens, cols]
  std::vector<float> channel_size_;  // [cols - 1]
  float log_rms_mean_ = 0, log_rms_size_ = 1;
};

// One parameter tensor with Adam's moments.
class Parameter {
 public:
  Parameter(int64_t rows, int64_t cols);
  void Step(float rate, int step);

  Matrix value;
  Matrix gradient;

 private:
  std::vector<float> first_, second_;
};

// out = w2 silu(w1 x + b1) + b2.
class RouterNetwork {
 public:
  RouterNetwork(int64_t inputs, int64_t hidden, int64_t outputs, std::mt19937_64& random);

  // Replaces `out` by the gradient of a batch's loss there, given the batch's place in the run.
  using LossFn = absl::FunctionRef<void(const int64_t* tokens, double progress, Matrix& out)>;
  // Adam over the batches in a drawn order, anew in each of the options' epochs, the rate falling
  // along a cosine. Tokens that do not fill a batch are left out.
  void Train(const RouterInputs& inputs, const RouterTrainingOptions& options,
             std::mt19937_64& random, LossFn loss);

  Parameter w1, b1, w2, b2;

 private:
  void Step(const int64_t* tokens, ConstMatrixView x, double progress, float rate, int step,
            LossFn loss);
};

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_ROUTER_NETWORK_H_
