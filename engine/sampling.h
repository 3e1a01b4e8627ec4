// From a request's sampling parameters and its tokens so far to the row the backend samples by:
// penalties and logit_bias become edits of single logits. Pure.
// Source: transformers' logits processors for repetition; presence and frequency as in OpenAI's
// API.
#ifndef MOBI_ENGINE_SAMPLING_H_
#define MOBI_ENGINE_SAMPLING_H_

#include <vector>

#include "engine/sequence.h"
#include "kernels/backend.h"

namespace mobi {

bool HasPenalties(const SamplingParams& params);

// The edits for the next token of `sequence`, at most one per token id.
std::vector<LogitEdit> LogitEdits(const Sequence& sequence);

// The row without its place in the batch (logits_row, edit_begin, edit_end).
SamplingRow MakeSamplingRow(const Sequence& sequence);

}  // namespace mobi

#endif  // MOBI_ENGINE_SAMPLING_H_
