#include <cblas.h>

#include <algorithm>

#include "peer_linears.h"

namespace mobi {
namespace {

class OpenBlasLinears final : public PeerLinears {
 public:
  OpenBlasLinears(const std::vector<MatmulShape>& shapes, int num_layers, int num_threads)
      : shapes_(shapes), num_layers_(num_layers) {
    openblas_set_num_threads(num_threads);
    for (int layer = 0; layer < num_layers; ++layer) {
      for (const MatmulShape& shape : shapes) {
        std::vector<float>& weight = weights_.emplace_back(shape.rows * shape.cols);
        for (size_t i = 0; i < weight.size(); ++i) {
          weight[i] = static_cast<float>(i * 2654435761u % 1021) / 1021.0f - 0.5f;
        }
      }
    }
  }

  std::string description() const override {
    return std::string(openblas_get_config()) + ", kernels " + openblas_get_corename();
  }
  int num_layers() const override { return num_layers_; }
  int bytes_of_weight() const override { return sizeof(float); }

  absl::Status Run(int num_tokens) override {
    for (size_t i = 0; i < weights_.size(); ++i) {
      const MatmulShape& shape = shapes_[i % shapes_.size()];
      const auto rows = static_cast<int>(shape.rows), cols = static_cast<int>(shape.cols);
      x_.resize(std::max<size_t>(x_.size(), num_tokens * shape.cols), 0.01f);
      out_.resize(std::max<size_t>(out_.size(), num_tokens * shape.rows));
      if (num_tokens == 1) {
        cblas_sgemv(CblasRowMajor, CblasNoTrans, rows, cols, 1, weights_[i].data(), cols, x_.data(),
                    1, 0, out_.data(), 1);
      } else {
        cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, num_tokens, rows, cols, 1, x_.data(),
                    cols, weights_[i].data(), cols, 0, out_.data(), rows);
      }
    }
    return absl::OkStatus();
  }

 private:
  const std::vector<MatmulShape> shapes_;
  const int num_layers_;
  std::vector<std::vector<float>> weights_;
  std::vector<float> x_, out_;
};

}  // namespace

std::unique_ptr<PeerLinears> CreateOpenBlas(const std::vector<MatmulShape>& shapes, int num_layers,
                                            int num_threads) {
  return std::make_unique<OpenBlasLinears>(shapes, num_layers, num_threads);
}

}  // namespace mobi
