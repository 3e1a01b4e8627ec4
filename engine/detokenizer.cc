#include "engine/detokenizer.h"

#include "engine/tokenizer_file.h"
#include "engine/tokenizer_utf8.h"

namespace mobi {

Detokenizer::Detokenizer(const Tokenizer& tokenizer, const DetokenizerOptions& options)
    : pipeline_(*tokenizer.pipeline_),
      skip_special_(options.skip_special),
      strip_left_(options.continuation ? 0 : pipeline_.decoder.strip_left) {}

std::string Detokenizer::Push(int32_t id) {
  std::string out;
  if (id < 0 || static_cast<size_t>(id) >= pipeline_.tokens.size()) return out;
  const TokenizerPipeline::Token& token = pipeline_.tokens[id];
  if (skip_special_ && token.special) return out;
  if (pipeline_.decoder.byte_level) {
    pending_ += token.bytes;
    EmitCharacters(out);
  } else if (token.byte_token) {
    AddToRun(token.bytes, out);
  } else {
    EndRun(out);
    Emit(token.bytes, out);
  }
  return out;
}

std::string Detokenizer::Flush() {
  std::string out;
  if (!pipeline_.decoder.byte_level) {
    EndRun(out);
  } else if (!pending_.empty()) {
    out = kReplacementCharacter;  // what is left is the start of one character
    pending_.clear();
  }
  return out;
}

void Detokenizer::EmitCharacters(std::string& out) {
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const Utf8Step step = NextUtf8(rest);
    if (step.kind == Utf8Step::kIncomplete) break;
    out += step.kind == Utf8Step::kCharacter ? rest.substr(0, step.length) : kReplacementCharacter;
    rest.remove_prefix(step.length);
  }
  pending_.erase(0, pending_.size() - rest.size());
}

// A run is text if all of it is UTF-8, else one replacement character a byte. So nothing of a run
// is certain before its end, until a byte is wrong: then everything is.
void Detokenizer::AddToRun(std::string_view byte, std::string& out) {
  if (run_broken_) {
    Emit(kReplacementCharacter, out);
    return;
  }
  pending_ += byte;
  while (run_checked_ < pending_.size()) {
    const Utf8Step step = NextUtf8(std::string_view(pending_).substr(run_checked_));
    if (step.kind == Utf8Step::kIncomplete) return;
    if (step.kind == Utf8Step::kIllFormed) {
      run_broken_ = true;
      EmitBroken(out);
      return;
    }
    run_checked_ += step.length;
  }
}

void Detokenizer::EndRun(std::string& out) {
  if (run_checked_ < pending_.size()) {
    EmitBroken(out);
  } else {
    Emit(pending_, out);
  }
  pending_.clear();
  run_checked_ = 0;
  run_broken_ = false;
}

void Detokenizer::EmitBroken(std::string& out) {
  for (size_t i = 0; i < pending_.size(); ++i) Emit(kReplacementCharacter, out);
  pending_.clear();
  run_checked_ = 0;
}

void Detokenizer::Emit(std::string_view text, std::string& out) {
  while (strip_left_ > 0 && !text.empty()) {
    if (text[0] != pipeline_.decoder.strip) {
      strip_left_ = 0;
      break;
    }
    text.remove_prefix(1);
    --strip_left_;
  }
  out += text;
}

}  // namespace mobi
