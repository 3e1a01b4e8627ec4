#include "calibrator/multiple_choice.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "calibrator/eval_session.h"
#include "calibrator/text_data.h"
#include "engine/base/status_macros.h"
#include "engine/precision.h"
#include "nlohmann/json.hpp"

namespace mobi {
namespace {

constexpr int kRequestsInFlight = 32;

// A choice as the engine scores it: tokens from `first` on are the choice's.
struct ScoredText {
  size_t question = 0;
  size_t choice = 0;
  std::vector<int32_t> ids;
  size_t first = 0;
};

std::string ParseQuestion(std::string_view line, ChoiceQuestion& question) {
  const nlohmann::json json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return "not a JSON object";
  const auto context = json.find("context"), choices = json.find("choices"),
             answer = json.find("answer");
  if (context == json.end() || !context->is_string()) return "context must be a string";
  if (choices == json.end() || !choices->is_array() || choices->size() < 2) {
    return "choices must be a list of two or more strings";
  }
  for (const auto& choice : *choices) {
    if (!choice.is_string() || choice.get_ref<const std::string&>().empty()) {
      return "choices must be strings that are not empty";
    }
    question.choices.push_back(choice);
  }
  if (answer == json.end() || !answer->is_number_integer() || *answer < 0 ||
      *answer >= choices->size()) {
    return absl::StrCat("answer must be a whole number from 0 to ", choices->size() - 1);
  }
  question.context = *context;
  question.answer = *answer;
  return "";
}

// Trailing spaces of the context belong to the continuation, where the tokenizer wants them; the
// continuation's tokens are those of the whole text behind as many as the context alone has.
absl::StatusOr<ScoredText> Encode(const EvalSession& session, const std::string& context,
                                  const std::string& choice) {
  const size_t end = context.find_last_not_of(" \t\n\r\f\v") + 1;
  MOBI_ASSIGN_OR_RETURN(const auto prefix, session.Encode(context.substr(0, end)));
  ScoredText text;
  MOBI_ASSIGN_OR_RETURN(text.ids, session.Encode(absl::StrCat(context, " ", choice)));
  text.first = std::max<size_t>(prefix.size(), 1);
  return text;
}

absl::StatusOr<std::vector<ScoredText>> EncodeAll(const EvalSession& session,
                                                  const std::vector<ChoiceQuestion>& questions,
                                                  const std::string& file) {
  const auto context = static_cast<size_t>(session.checkpoint().config().max_position_embeddings);
  std::vector<ScoredText> texts;
  for (size_t q = 0; q < questions.size(); ++q) {
    for (size_t c = 0; c < questions[q].choices.size(); ++c) {
      MOBI_ASSIGN_OR_RETURN(ScoredText text,
                            Encode(session, questions[q].context, questions[q].choices[c]));
      if (text.ids.size() > context || text.first >= text.ids.size()) {
        return absl::InvalidArgumentError(
            absl::StrCat(file, ": question ", q + 1, ", choice ", c, ": ", text.ids.size(),
                         " tokens, ", text.ids.size() - std::min(text.first, text.ids.size()),
                         " of them the choice's; the model takes ", context));
      }
      text.question = q;
      text.choice = c;
      texts.push_back(std::move(text));
    }
  }
  return texts;
}

// The first of the largest, as argmax takes it.
int Best(const std::vector<double>& scores) {
  return static_cast<int>(std::max_element(scores.begin(), scores.end()) - scores.begin());
}

int64_t Characters(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

double MeanStderr(double mean, int64_t n) {
  return n > 1 ? std::sqrt(mean * (1 - mean) / static_cast<double>(n - 1)) : 0.0;
}

void Judge(const std::vector<ChoiceQuestion>& questions, ChoiceResult& result) {
  for (size_t q = 0; q < questions.size(); ++q) {
    std::vector<double> normalised = result.logprobs[q];
    for (size_t c = 0; c < normalised.size(); ++c) {
      normalised[c] /= static_cast<double>(Characters(questions[q].choices[c]));
    }
    result.acc += Best(result.logprobs[q]) == questions[q].answer;
    result.acc_norm += Best(normalised) == questions[q].answer;
  }
  result.questions = static_cast<int64_t>(questions.size());
  result.acc /= static_cast<double>(questions.size());
  result.acc_norm /= static_cast<double>(questions.size());
  result.acc_stderr = MeanStderr(result.acc, result.questions);
  result.acc_norm_stderr = MeanStderr(result.acc_norm, result.questions);
}

absl::StatusOr<ChoiceResult> ScoreAt(Engine& engine, const std::vector<ScoredText>& texts,
                                     const std::vector<ChoiceQuestion>& questions, float bits) {
  ChoiceResult result;
  result.target_bits = bits;
  for (const ChoiceQuestion& q : questions) result.logprobs.emplace_back(q.choices.size());
  std::vector<std::unique_ptr<ScoreSink>> sinks(texts.size());
  double bits_sum = 0, tokens = 0;
  absl::Status status;
  const auto collect = [&](size_t i) {
    const RequestEnd end = sinks[i]->Wait();
    if (status.ok()) status = end.status;
    const auto& logprobs = sinks[i]->logprobs();
    double& sum = result.logprobs[texts[i].question][texts[i].choice];
    for (size_t t = texts[i].first; t <= logprobs.size(); ++t) sum += logprobs[t - 1];
    bits_sum += end.mean_effective_bits * static_cast<double>(texts[i].ids.size());
    tokens += static_cast<double>(texts[i].ids.size());
    sinks[i].reset();
  };
  size_t submitted = 0;
  for (size_t next = 0; next < submitted || (submitted < texts.size() && status.ok()); ++next) {
    while (submitted < texts.size() && submitted < next + kRequestsInFlight && status.ok()) {
      GenerationRequest request;
      request.prompt = texts[submitted].ids;
      request.max_new_tokens = 0;
      request.prompt_logprobs = true;
      request.precision = {bits, bits};
      sinks[submitted] = std::make_unique<ScoreSink>();
      const auto id = engine.Submit(std::move(request), sinks[submitted].get());
      if (!id.ok()) {
        status = id.status();
      } else {
        ++submitted;
      }
    }
    if (next < submitted) collect(next);
  }
  MOBI_RETURN_IF_ERROR(status);
  result.effective_bits = bits_sum / tokens;
  Judge(questions, result);
  return result;
}

}  // namespace

absl::StatusOr<std::vector<ChoiceQuestion>> ParseQuestions(std::string_view jsonl,
                                                           const std::string& file) {
  std::vector<ChoiceQuestion> questions;
  int number = 0;
  while (!jsonl.empty()) {
    const size_t end = std::min(jsonl.find('\n'), jsonl.size());
    const std::string_view line = jsonl.substr(0, end);
    jsonl.remove_prefix(std::min(end + 1, jsonl.size()));
    ++number;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const std::string problem = ParseQuestion(line, questions.emplace_back());
    if (!problem.empty()) {
      return absl::InvalidArgumentError(absl::StrCat(file, ":", number, ": ", problem));
    }
  }
  if (questions.empty()) return absl::InvalidArgumentError(absl::StrCat(file, ": no questions"));
  return questions;
}

absl::StatusOr<std::vector<ChoiceResult>> EvaluateChoices(const ChoiceOptions& options,
                                                          const Clock& clock,
                                                          const ChoiceCallback& on_result) {
  MOBI_RETURN_IF_ERROR(CheckBits(options.bits));
  MOBI_ASSIGN_OR_RETURN(const std::string jsonl, ReadText(options.data_path, TextLayout::kPlain));
  MOBI_ASSIGN_OR_RETURN(std::vector<ChoiceQuestion> questions,
                        ParseQuestions(jsonl, options.data_path));
  if (options.limit > 0 && options.limit < static_cast<int64_t>(questions.size())) {
    questions.resize(static_cast<size_t>(options.limit));
  }
  MOBI_ASSIGN_OR_RETURN(const auto session, EvalSession::Open({.model_dir = options.model_dir,
                                                               .device = options.device,
                                                               .num_threads = options.num_threads,
                                                               .in_flight = kRequestsInFlight},
                                                              clock));
  MOBI_ASSIGN_OR_RETURN(const auto texts, EncodeAll(*session, questions, options.data_path));
  const bool quantized = session->checkpoint().quantized();
  std::vector<ChoiceResult> results;
  for (const float bits : quantized ? options.bits : std::vector<float>{kMaxBits}) {
    const TimePoint start = clock.Now();
    MOBI_ASSIGN_OR_RETURN(ChoiceResult result, ScoreAt(session->engine(), texts, questions, bits));
    result.is_float = !quantized;
    if (result.is_float) result.target_bits = result.effective_bits;
    result.seconds = ToSeconds(clock.Now() - start);
    on_result(result);
    results.push_back(std::move(result));
  }
  return results;
}

}  // namespace mobi
