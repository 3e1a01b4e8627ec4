// How a model is calibrated: every choice of every step, named, with defaults, read from YAML and
// recorded in the checkpoint. Each section belongs to one piece: statistics (statistics.h), base
// (base_fit.h), joint (joint_codes.h), refine (code_descent.h, level_fit.h), baseline
// (fixed_width.h), tuning (scale_tuning.h), lm_head (lm_head_fit.h), routing (routing_samples.h,
// router_training.h, gate_training.h, price_table.h).
#ifndef MOBI_CALIBRATOR_RECIPE_H_
#define MOBI_CALIBRATOR_RECIPE_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "calibrator/block_calibration.h"
#include "calibrator/gate_training.h"
#include "calibrator/lm_head_fit.h"
#include "calibrator/router_training.h"
#include "calibrator/routing_samples.h"
#include "calibrator/scale_tuning.h"
#include "nlohmann/json.hpp"

namespace mobi {

// What routers learn: to predict losses (ours), or gates as the paper trains them.
enum class RoutingMethod { kLosses, kGates };

struct RoutingOptions {
  RoutingMethod method = RoutingMethod::kLosses;
  GateOptions gates;
  int64_t sequences = 16;      // that routers learn from; together they are the coherent batch
  int64_t price_tokens = 256;  // of each sequence, run once per price
  double byte_share = 0.04;    // router bytes at most, of what a token reads at `byte_share_bits`
  double byte_share_bits = 2;
  int max_hidden = 32;
  RoutingSampleOptions samples;
  RouterTrainingOptions training;
};

struct Recipe {
  int64_t fit_sequences = 256;  // that blocks are fitted on, of those drawn; 0: all
  // Tokens of each of them, from its start; 0: all. As many as tuning.positions, so that the float
  // model runs once on what is fitted and tuned on.
  int64_t fit_positions = 512;
  BlockCalibrationOptions blocks;
  ScaleTuningOptions tuning;
  LmHeadOptions lm_head;
  RoutingOptions routing;
};

// The defaults, changed where `yaml` says so. INVALID_ARGUMENT: one line with file, line and key.
absl::StatusOr<Recipe> ParseRecipe(std::string_view yaml, const std::string& file);
// As ParseRecipe for the file at `path`; "rtn-B", "gptq-B" and "lwc-B" name the baselines of
// fixed_width.h at B bits, "paper" the method as published: learned clipping and gates.
absl::StatusOr<Recipe> ReadRecipe(const std::string& path);

// The whole recipe, nested by section.
nlohmann::json RecipeToJson(const Recipe& recipe);

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_RECIPE_H_
