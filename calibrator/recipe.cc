#include "calibrator/recipe.h"

#include <array>
#include <cmath>
#include <map>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/mapped_file.h"
#include "engine/base/status_macros.h"
#include "yaml-cpp/yaml.h"

namespace mobi {

NLOHMANN_JSON_SERIALIZE_ENUM(FixedMethod, {{FixedMethod::kNone, "none"},
                                           {FixedMethod::kRtn, "rtn"},
                                           {FixedMethod::kGptq, "gptq"},
                                           {FixedMethod::kLwc, "lwc"}})

NLOHMANN_JSON_SERIALIZE_ENUM(BaseMethod,
                             {{BaseMethod::kSearch, "search"}, {BaseMethod::kClipping, "clipping"}})

NLOHMANN_JSON_SERIALIZE_ENUM(RoutingMethod,
                             {{RoutingMethod::kLosses, "losses"}, {RoutingMethod::kGates, "gates"}})

namespace {

constexpr const char* NamesOf(FixedMethod) { return "none, rtn, gptq or lwc"; }
constexpr const char* NamesOf(BaseMethod) { return "search or clipping"; }
constexpr const char* NamesOf(RoutingMethod) { return "losses or gates"; }

// False when no method has that name.
template <typename Method>
bool ParseMethod(std::string_view name, Method& method) {
  const nlohmann::json json = std::string(name);
  method = json.get<Method>();
  return nlohmann::json(method) == json;
}

// Every key once, with its bounds: what reads a recipe and what records it both walk this list.
template <typename Visitor>
void VisitRecipe(Recipe& recipe, Visitor&& visit) {
  BlockCalibrationOptions& blocks = recipe.blocks;
  LinearFitOptions& fit = blocks.fit;
  ScaleTuningOptions& tuning = recipe.tuning;
  RoutingOptions& routing = recipe.routing;
  visit("statistics.sequences", recipe.fit_sequences, 0, 1 << 20);
  visit("statistics.positions", recipe.fit_positions, 0, 1 << 20);
  visit("statistics.stream_levels", blocks.stream_levels, 1, kNumLevels);
  visit("statistics.float_from_level", blocks.float_from_level, 1, kNumLevels + 1);
  visit("statistics.damping", blocks.damping, 1e-8, 10);
  visit("base.method", fit.base.method, 0, 0);
  visit("base.level_weights", fit.base.level_weights, 0, 1e9);
  visit("base.min_shrink", fit.base.min_shrink, 0.05, 1);
  visit("base.steps", fit.base.steps, 1, 1000);
  visit("base.clip_base_epochs", blocks.clipping.base_epochs, 1, 100000);
  visit("base.clip_joint_epochs", blocks.clipping.joint_epochs, 1, 100000);
  visit("base.clip_learning_rate", blocks.clipping.learning_rate, 1e-9, 10);
  visit("base.clip_gate_rounds", blocks.clipping.gate_rounds, 1, 1000);
  visit("baseline.method", blocks.fixed.method, 0, 0);
  visit("baseline.bits", blocks.fixed.bits, 2, 8);
  visit("baseline.lwc_steps", blocks.fixed.lwc_steps, 1, 100000);
  visit("baseline.lwc_learning_rate", blocks.fixed.lwc_learning_rate, 1e-9, 1);
  visit("joint.enabled", fit.joint_codes, 0, 1);
  visit("joint.level_weights", blocks.level_weights, 0, 1e9);
  visit("refine.rounds", fit.rounds, 0, 100);
  visit("refine.passes", fit.passes, 0, 100);
  visit("refine.ridge", fit.ridge, 1e-12, 10);
  visit("tuning.steps", tuning.steps, 0, 100000);
  visit("tuning.batch", tuning.batch, 1, 1024);
  visit("tuning.positions", tuning.positions, 1, 1 << 20);
  visit("tuning.learning_rate", tuning.learning_rate, 1e-9, 1);
  visit("tuning.train", tuning.train, 0, 1);
  visit("tuning.level_shares", tuning.level_shares, 0, 1);
  visit("tuning.pure_every", tuning.pure_every, 0, 1000000);
  visit("tuning.allocated_share", tuning.allocated_share, 0, 1);
  visit("tuning.allocated_bits", tuning.allocated_bits, 2, 8);
  visit("tuning.allocated_jitter", tuning.allocated_jitter, 0, 10);
  visit("tuning.allocated_sequences", tuning.allocated_sequences, 1, 1024);
  visit("lm_head.slices", recipe.lm_head.slices, 0, 1);
  visit("lm_head.min_level", recipe.lm_head.min_level, 1, kNumLevels);
  visit("tuning.max_memory_gib", tuning.max_memory_gib, 0, 1 << 20);
  visit("routing.method", routing.method, 0, 0);
  visit("routing.gate_bits", routing.gates.bits, 2, 8);
  visit("routing.gate_budget_weight", routing.gates.budget_weight, 0, 1e6);
  visit("routing.gate_first_temperature", routing.gates.first_temperature, 1e-3, 1e3);
  visit("routing.gate_last_temperature", routing.gates.last_temperature, 1e-3, 1e3);
  visit("routing.sequences", routing.sequences, 1, 1024);
  visit("routing.price_tokens", routing.price_tokens, 1, 1 << 20);
  visit("routing.byte_share", routing.byte_share, 0, 1);
  visit("routing.byte_share_bits", routing.byte_share_bits, 2, 8);
  visit("routing.max_hidden", routing.max_hidden, 1, kMaxRouterHidden);
  visit("routing.level_shares", routing.samples.level_shares, 0, 1);
  visit("routing.epochs", routing.training.epochs, 1, 100000);
  visit("routing.batch", routing.training.batch, 1, 1 << 20);
  visit("routing.learning_rate", routing.training.learning_rate, 1e-9, 1);
}

template <typename T>
struct IsArray : std::false_type {};
template <typename T, size_t n>
struct IsArray<std::array<T, n>> : std::true_type {};

class Reader {
 public:
  Reader(const YAML::Node& root, const std::string& file) : file_(file) {
    if (root.IsNull()) return;
    if (!root.IsMap()) {
      Fail(root, "a recipe is a mapping of sections");
      return;
    }
    for (const auto& section : root) {
      if (!section.second.IsMap()) {
        Fail(section.first, absl::StrCat(section.first.Scalar(), " must be a mapping"));
        return;
      }
      for (const auto& key : section.second) {
        keys_[absl::StrCat(section.first.Scalar(), ".", key.first.Scalar())] = key.second;
      }
    }
  }

  template <typename T>
  void operator()(const char* name, T& value, double min, double max) {
    const auto found = keys_.find(name);
    if (found == keys_.end() || !status_.ok()) return;
    Read(found->second, name, value, min, max);
    keys_.erase(found);
  }

  absl::Status Finish() {
    if (status_.ok() && !keys_.empty()) {
      Fail(keys_.begin()->second, absl::StrCat("unknown key ", keys_.begin()->first));
    }
    return status_;
  }

 private:
  void Fail(const YAML::Node& node, const std::string& reason) {
    if (!status_.ok()) return;
    status_ =
        absl::InvalidArgumentError(absl::StrCat(file_, ":", node.Mark().line + 1, ": ", reason));
  }

  template <typename T>
  void Read(const YAML::Node& node, const char* name, T& value, double min, double max) {
    if constexpr (IsArray<T>::value) {
      if (!node.IsSequence() || node.size() != value.size()) {
        Fail(node, absl::StrCat(name, " must be a list of ", value.size()));
        return;
      }
      for (size_t i = 0; i < value.size(); ++i) Read(node[i], name, value[i], min, max);
    } else if constexpr (std::is_same_v<T, std::vector<int>>) {
      if (!node.IsSequence() || node.size() == 0) {
        Fail(node, absl::StrCat(name, " must be a list"));
        return;
      }
      value.resize(node.size());
      for (size_t i = 0; i < value.size(); ++i) Read(node[i], name, value[i], min, max);
    } else if constexpr (std::is_enum_v<T>) {
      if (!ParseMethod(node.IsScalar() ? node.Scalar() : "", value)) {
        Fail(node, absl::StrCat(name, " must be ", NamesOf(value)));
      }
    } else {
      ReadScalar(node, name, value, min, max);
    }
  }

  template <typename T>
  void ReadScalar(const YAML::Node& node, const char* name, T& value, double min, double max) {
    constexpr const char* kKind = std::is_same_v<T, bool> ? "true or false"
                                  : std::is_integral_v<T> ? "a whole number"
                                                          : "a number";
    try {
      value = node.as<T>();
    } catch (const YAML::Exception&) {
      Fail(node, absl::StrCat(name, " must be ", kKind));
      return;
    }
    const auto number = static_cast<double>(value);
    if (!(number >= min && number <= max)) {
      Fail(node, absl::StrCat(name, " must be within ", min, " and ", max));
    }
  }

  const std::string& file_;
  std::map<std::string, YAML::Node> keys_;
  absl::Status status_;
};

absl::Status CheckStreams(const BlockCalibrationOptions& blocks, const std::string& file) {
  const std::vector<int>& levels = blocks.stream_levels;
  for (size_t i = 1; i < levels.size(); ++i) {
    if (levels[i] <= levels[i - 1]) {
      return absl::InvalidArgumentError(
          absl::StrCat(file, ": statistics.stream_levels must ascend"));
    }
  }
  if (levels.front() != 1 && blocks.fixed.method == FixedMethod::kNone) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": statistics.stream_levels must start with 1"));
  }
  return absl::OkStatus();
}

absl::Status CheckLmHead(const Recipe& recipe, const std::string& file) {
  if (!recipe.lm_head.slices || recipe.routing.method != RoutingMethod::kGates) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      file,
      ": routing.method gates needs lm_head.slices false: the price of gates is not in nats, "
      "by which lm_head's slices are chosen"));
}

// "rtn-2", "gptq-3": the method at that width, with routers that cost next to nothing and
// lm_head as it is, since such a checkpoint is read at its highest level alone.
bool BaselineRecipe(std::string_view name, Recipe& recipe) {
  FixedWidthOptions& fixed = recipe.blocks.fixed;
  const size_t dash = name.find('-');
  if (dash == std::string_view::npos || dash + 2 != name.size()) return false;
  fixed.bits = name.back() - '0';
  if (!ParseMethod(name.substr(0, dash), fixed.method) || fixed.method == FixedMethod::kNone ||
      fixed.bits < 2 || fixed.bits > 8) {
    return false;
  }
  recipe.blocks.stream_levels = {kNumLevels};
  recipe.blocks.float_from_level = kNumLevels + 1;
  recipe.tuning.steps = 0;
  recipe.lm_head.slices = false;
  recipe.routing.sequences = 1;
  recipe.routing.price_tokens = 64;
  recipe.routing.training.epochs = 1;
  return true;
}

// The method as its paper has it: ranges learned on the block's output, gates, nothing else. The
// price of gates is not in nats, as lm_head's losses are.
Recipe PaperRecipe() {
  Recipe recipe;
  recipe.fit_sequences = 128;
  recipe.fit_positions = 0;
  recipe.blocks.fit.base.method = BaseMethod::kClipping;
  recipe.tuning.steps = 0;
  recipe.lm_head.slices = false;
  recipe.routing.method = RoutingMethod::kGates;
  return recipe;
}

}  // namespace

absl::StatusOr<Recipe> ParseRecipe(std::string_view yaml, const std::string& file) {
  YAML::Node root;
  try {
    root = YAML::Load(std::string(yaml));
  } catch (const YAML::Exception& e) {
    return absl::InvalidArgumentError(absl::StrCat(file, ":", e.mark.line + 1, ": ", e.msg));
  }
  Recipe recipe;
  Reader reader(root, file);
  VisitRecipe(recipe, reader);
  MOBI_RETURN_IF_ERROR(reader.Finish());
  MOBI_RETURN_IF_ERROR(CheckStreams(recipe.blocks, file));
  MOBI_RETURN_IF_ERROR(CheckLmHead(recipe, file));
  return recipe;
}

absl::StatusOr<Recipe> ReadRecipe(const std::string& path) {
  if (Recipe recipe; BaselineRecipe(path, recipe)) return recipe;
  if (path == "paper") return PaperRecipe();
  MOBI_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path, 1 << 20));
  return ParseRecipe(file.text(), path);
}

nlohmann::json RecipeToJson(const Recipe& recipe) {
  nlohmann::json json;
  Recipe copy = recipe;
  VisitRecipe(copy, [&](const std::string& name, const auto& value, double, double) {
    const size_t dot = name.find('.');
    json[name.substr(0, dot)][name.substr(dot + 1)] = value;
  });
  return json;
}

}  // namespace mobi
