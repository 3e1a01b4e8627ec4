#include "server/loadgen/trace.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/civil_time.h"
#include "engine/base/mapped_file.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr uint64_t kMaxTraceBytes = uint64_t{256} << 20;
constexpr size_t kMaxLineBytes = 4096;
constexpr int kMaxTokens = 1 << 24;
constexpr std::array<absl::string_view, 3> kColumns = {"TIMESTAMP", "ContextTokens",
                                                       "GeneratedTokens"};
using Columns = std::array<size_t, kColumns.size()>;

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

// Seconds since 1970 of "YYYY-MM-DD HH:MM:SS[.fraction]", or a plain number of seconds.
std::optional<double> ParseTimestamp(absl::string_view text) {
  double seconds = 0;
  if (absl::SimpleAtod(text, &seconds)) {
    return std::isfinite(seconds) ? std::optional(seconds) : std::nullopt;
  }
  const std::pair<absl::string_view, absl::string_view> parts =
      absl::StrSplit(text, absl::MaxSplits('.', 1));
  std::string civil_text(parts.first);
  std::replace(civil_text.begin(), civil_text.end(), ' ', 'T');
  absl::CivilSecond civil;
  if (!absl::ParseCivilTime(civil_text, &civil)) return std::nullopt;
  double fraction = 0;
  const bool digits = std::all_of(parts.second.begin(), parts.second.end(), absl::ascii_isdigit);
  if (!digits || (parts.second.empty() && text.back() == '.')) return std::nullopt;
  if (!parts.second.empty() && !absl::SimpleAtod(absl::StrCat("0.", parts.second), &fraction)) {
    return std::nullopt;
  }
  return static_cast<double>(civil - absl::CivilSecond()) + fraction;
}

absl::StatusOr<Columns> FindColumns(absl::string_view header, const std::string& where) {
  const std::vector<absl::string_view> names = absl::StrSplit(header, ',');
  Columns columns{};
  for (size_t i = 0; i < kColumns.size(); ++i) {
    const auto found = std::find(names.begin(), names.end(), kColumns[i]);
    if (found == names.end()) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": no column ", kColumns[i]));
    }
    columns[i] = static_cast<size_t>(found - names.begin());
  }
  return columns;
}

// The row with its time as written.
absl::StatusOr<TraceRow> ParseRow(absl::string_view line, const Columns& columns,
                                  size_t num_columns, const std::string& where) {
  const std::vector<absl::string_view> fields = absl::StrSplit(line, ',');
  if (fields.size() != num_columns) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": ", fields.size(), " fields, the header has ", num_columns));
  }
  TraceRow row;
  const auto seconds = ParseTimestamp(fields[columns[0]]);
  if (!seconds) return absl::InvalidArgumentError(absl::StrCat(where, ": TIMESTAMP is no time"));
  row.seconds = *seconds;
  int* const tokens[] = {&row.context_tokens, &row.generated_tokens};
  for (int i = 0; i < 2; ++i) {
    if (!absl::SimpleAtoi(fields[columns[i + 1]], tokens[i]) || *tokens[i] < 0 ||
        *tokens[i] > kMaxTokens) {
      return absl::InvalidArgumentError(absl::StrCat(
          where, ": ", kColumns[i + 1], " is not a whole number in [0, ", kMaxTokens, "]"));
    }
  }
  return row;
}

Duration Seconds(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

int Scaled(int tokens, double scale) {
  return static_cast<int>(std::clamp(std::round(tokens * scale), 1.0, double{kMaxTokens}));
}

}  // namespace

absl::StatusOr<std::vector<TraceRow>> ParseTrace(std::string_view text, const std::string& file) {
  std::vector<TraceRow> rows;
  Columns columns{};
  size_t num_columns = 0;
  double first = 0;
  int number = 0;
  while (!text.empty()) {
    const std::string where = absl::StrCat(file, ":", ++number);
    const size_t end = std::min(text.find('\n'), text.size());
    absl::string_view line = View(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (line.size() > kMaxLineBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": ", line.size(), " bytes in one line"));
    }
    if (num_columns == 0) {
      MOBI_ASSIGN_OR_RETURN(columns, FindColumns(line, where));
      num_columns = static_cast<size_t>(std::count(line.begin(), line.end(), ',')) + 1;
      continue;
    }
    if (line.empty()) continue;
    MOBI_ASSIGN_OR_RETURN(TraceRow row, ParseRow(line, columns, num_columns, where));
    if (rows.empty()) first = row.seconds;
    row.seconds -= first;
    if (!rows.empty() && row.seconds < rows.back().seconds) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": TIMESTAMP goes back"));
    }
    rows.push_back(row);
  }
  if (rows.empty()) return absl::InvalidArgumentError(absl::StrCat(file, ": no requests"));
  return rows;
}

absl::StatusOr<std::vector<TraceRow>> ReadTrace(const std::string& path) {
  MOBI_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path, kMaxTraceBytes));
  return ParseTrace(file.text(), path);
}

absl::StatusOr<std::vector<Arrival>> TraceArrivals(absl::Span<const TraceRow> rows,
                                                   const TraceOptions& options) {
  const double begin = ToSeconds(options.begin);
  const double end = options.duration > Duration::zero() ? begin + ToSeconds(options.duration)
                                                         : rows.back().seconds + 1;
  std::vector<Arrival> arrivals;
  for (const TraceRow& row : rows) {
    if (row.seconds < begin || row.seconds >= end) continue;
    Arrival arrival;
    arrival.at = Seconds((row.seconds - begin) / options.time_compression);
    arrival.prompt_tokens =
        std::min(Scaled(row.context_tokens, options.token_scale), options.max_model_len - 1);
    arrival.new_tokens =
        std::min({Scaled(row.generated_tokens, options.token_scale), options.max_new_tokens,
                  options.max_model_len - arrival.prompt_tokens});
    arrivals.push_back(arrival);
  }
  if (arrivals.empty()) {
    return absl::InvalidArgumentError("the part of the trace that was asked for is empty");
  }
  return arrivals;
}

}  // namespace mobi
