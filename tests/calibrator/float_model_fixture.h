// A tiny float model, written to a folder and opened as the calibrator opens one.
#ifndef MOBI_TESTS_CALIBRATOR_FLOAT_MODEL_FIXTURE_H_
#define MOBI_TESTS_CALIBRATOR_FLOAT_MODEL_FIXTURE_H_

#include <cstdint>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "calibrator/float_model.h"
#include "engine/checkpoint.h"
#include "gtest/gtest.h"
#include "tests/engine/test_models.h"

namespace mobi {

class FloatModelTest : public testing::Test {
 protected:
  // For ASSERT_NO_FATAL_FAILURE.
  void OpenModel(int64_t seq_len, const TestModelOptions& options = {}) {
    ASSERT_TRUE(WriteTestModel(dir_.Sub("float"), options).ok());
    auto checkpoint = Checkpoint::Open(dir_.Sub("float"), {});
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    checkpoint_ = std::make_unique<Checkpoint>(*std::move(checkpoint));
    auto model = FloatModel::Open(*checkpoint_, static_cast<int>(seq_len));
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = std::make_unique<FloatModel>(*std::move(model));
  }

  static std::vector<int32_t> RandomIds(int64_t count) {
    std::mt19937_64 random(3);
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < count; ++i) ids.push_back(static_cast<int32_t>(random() % 256));
    return ids;
  }

  TempDir dir_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<FloatModel> model_;
};

}  // namespace mobi

#endif  // MOBI_TESTS_CALIBRATOR_FLOAT_MODEL_FIXTURE_H_
