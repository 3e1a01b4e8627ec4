// mobictl's output: text as it streams, and statuses as a person reads them.
#ifndef MOBI_SERVER_CTL_PRINT_H_
#define MOBI_SERVER_CTL_PRINT_H_

#include <cstdio>
#include <string>

#include "mobi/v1/inference.pb.h"
#include "mobi/v1/precision.pb.h"

namespace mobi {

// One JSON object on one line, with field names as in the .proto files.
std::string ToJson(const google::protobuf::Message& message);

// Prints the text of a generation's chunks to stdout as they come. With colour, a chunk's colour
// tells its effective bits: red for 2, green for 8. Several completions are told apart by a line
// before each piece.
class TextPrinter {
 public:
  TextPrinter(bool color, int num_completions) : color_(color), num_completions_(num_completions) {}

  void Print(const v1::GenerateResponse& message);
  // Ends the text with a line break if it has none.
  void End();

  const std::string& text() const { return text_; }  // of completion 0
  float first_bits() const { return first_bits_; }
  float last_bits() const { return last_bits_; }

 private:
  void Write(const std::string& text, float bits);

  const bool color_;
  const int num_completions_;
  int last_index_ = -1;
  std::string text_;
  float first_bits_ = 0;
  float last_bits_ = 0;
  bool at_line_start_ = true;
};

// "64 tokens in 1.2 s (53 tokens/s) ...": usage, timings and effective bits.
std::string DescribeSummary(const v1::Summary& summary, const TextPrinter& printer);

std::string DescribeModel(const v1::GetModelResponse& model);
std::string DescribeStatus(const v1::PrecisionStatus& status);
// A row of `mobictl watch`, and the heading over it.
std::string WatchHeading();
std::string WatchRow(const v1::PrecisionStatus& status);

}  // namespace mobi

#endif  // MOBI_SERVER_CTL_PRINT_H_
