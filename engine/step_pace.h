// How long steps take, learnt while serving, so that prompts do not stall the decodes beside them:
// a step may take only so many times what its decodes alone would. Works by feedback, so it needs
// no model of the machine: where decodes are bound by memory a prompt's tokens are nearly free and
// chunks become long, where every token costs the same they become short. Belongs to the engine's
// thread; deterministic.
#ifndef MOBI_ENGINE_STEP_PACE_H_
#define MOBI_ENGINE_STEP_PACE_H_

#include <vector>

namespace mobi {

class StepPace {
 public:
  // max_slowdown: a step with decodes and prompts takes at most so many times one with the decodes
  // alone; 1 or less: no limit. full_step: prompt tokens of a step that tell the pace of prompts.
  StepPace(double max_slowdown, int max_num_seqs, int full_step);

  void Observe(int decodes, int prompt_tokens, double seconds);

  // How many prompt tokens may run beside so many decodes. Never less than a few, so that prompts
  // get on in any case; without a decode there is no limit.
  int PromptTokensBeside(int decodes) const;

  // About the fastest of late, so waits computed from it are at least that long; 0: not known yet.
  double seconds_per_prompt_token() const { return seconds_per_prompt_token_; }

 private:
  double DecodeSeconds(int decodes) const;
  void ObserveMixed(int decodes, int prompt_tokens, double seconds);

  const double max_slowdown_;
  const int full_step_;
  std::vector<double> decode_seconds_;  // by number of decodes, without prompts; 0: not seen
  double seconds_per_token_beside_ = 0;
  int last_beside_ = 0;
  double seconds_per_prompt_token_ = 0;
};

}  // namespace mobi

#endif  // MOBI_ENGINE_STEP_PACE_H_
