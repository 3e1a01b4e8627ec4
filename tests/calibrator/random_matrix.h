// Random matrices from a seed, for tests.
#ifndef MOBI_TESTS_CALIBRATOR_RANDOM_MATRIX_H_
#define MOBI_TESTS_CALIBRATOR_RANDOM_MATRIX_H_

#include <random>

#include "calibrator/matrix.h"

namespace mobi {

inline Matrix RandomMatrix(int64_t rows, int64_t cols, uint64_t seed, float scale = 1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0, scale);
  Matrix m(rows, cols);
  for (int64_t i = 0; i < m.size(); ++i) m.data()[i] = normal(random);
  return m;
}

// Inputs whose channels are correlated and of unequal size, as activations are.
inline Matrix CorrelatedInputs(int64_t tokens, int64_t cols, uint64_t seed) {
  const Matrix common = RandomMatrix(tokens, 8, seed), mix = RandomMatrix(8, cols, seed + 1);
  Matrix x = RandomMatrix(tokens, cols, seed + 2, 0.3f);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < cols; ++j) {
      for (int64_t c = 0; c < 8; ++c) x(t, j) += common(t, c) * mix(c, j);
      if (j % 37 == 5) x(t, j) *= 20;
    }
  }
  return x;
}

}  // namespace mobi

#endif  // MOBI_TESTS_CALIBRATOR_RANDOM_MATRIX_H_
