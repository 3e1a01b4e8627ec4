#include "server/loadgen/load_report.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace mobi {
namespace {

double Quantile(const std::vector<double>& sorted, double q) {
  const double rank = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(rank);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return std::lerp(sorted[below], sorted[above], rank - static_cast<double>(below));
}

bool Within(Duration value, Duration limit) { return limit == Duration::zero() || value <= limit; }

bool In(const Stretch& stretch, Duration at) { return at >= stretch.begin && at < stretch.end; }

// Latencies of the requests that were to be sent in the stretch.
void AddLatencies(absl::Span<const Outcome> outcomes, const Stretch& stretch, const Slo& slo,
                  LoadReport& report) {
  std::vector<double> ttft, gaps, per_token, end, queue, refusal, lateness;
  int met = 0;
  for (const Outcome& o : outcomes) {
    if (!In(stretch, o.arrival.at)) continue;
    ++report.requests;
    ++report.by_status[absl::StatusCodeToString(o.status.code())];
    met += Meets(o, slo) ? 1 : 0;
    lateness.push_back(ToMillis(o.lateness));
    if (o.ttft > Duration::zero()) ttft.push_back(ToMillis(o.ttft));
    gaps.insert(gaps.end(), o.gaps_ms.begin(), o.gaps_ms.end());
    if (o.tokens > 1) per_token.push_back(o.MeanGapMs());
    if (o.status.ok()) {
      end.push_back(ToMillis(o.end));
      queue.push_back(o.queue_ms);
    } else if (o.tokens == 0) {
      refusal.push_back(ToMillis(o.end));
    }
  }
  report.slo_attainment = report.requests == 0 ? 0 : static_cast<double>(met) / report.requests;
  report.offered_rps = report.requests / report.seconds;
  report.ttft_ms = PercentilesOf(std::move(ttft));
  report.inter_token_ms = PercentilesOf(std::move(gaps));
  report.time_per_token_ms = PercentilesOf(std::move(per_token));
  report.end_to_end_ms = PercentilesOf(std::move(end));
  report.queue_ms = PercentilesOf(std::move(queue));
  report.refusal_ms = PercentilesOf(std::move(refusal));
  report.lateness_ms = PercentilesOf(std::move(lateness));
}

// Rates of what ended in the stretch, and what it was computed with.
void AddRates(absl::Span<const Outcome> outcomes, const Stretch& stretch, const Slo& slo,
              LoadReport& report) {
  int64_t completed = 0, good = 0, good_tokens = 0, tokens = 0, prompt_tokens = 0, cached = 0;
  double bits = 0;
  int64_t computed = 0;
  for (const Outcome& o : outcomes) {
    if (!o.status.ok() || !In(stretch, o.arrival.at + o.end)) continue;
    ++completed;
    tokens += o.tokens;
    prompt_tokens += o.prompt_tokens;
    cached += o.cached_tokens;
    const int64_t own = o.prompt_tokens - o.cached_tokens + o.tokens;
    computed += own;
    bits += o.effective_bits * static_cast<double>(own);
    if (!Meets(o, slo)) continue;
    ++good;
    good_tokens += o.tokens;
  }
  const auto rate = [&](int64_t count) { return static_cast<double>(count) / report.seconds; };
  report.completed_rps = rate(completed);
  report.goodput_rps = rate(good);
  report.goodput_tokens_per_second = rate(good_tokens);
  report.tokens_per_second = rate(tokens);
  report.prompt_tokens_per_second = rate(prompt_tokens);
  if (prompt_tokens > 0) {
    report.cached_fraction = static_cast<double>(cached) / static_cast<double>(prompt_tokens);
  }
  if (computed > 0) report.mean_effective_bits = bits / static_cast<double>(computed);
}

std::string Row(const char* name, const Percentiles& p) {
  return absl::StrFormat("  %-22s %9.1f %9.1f %9.1f %9.1f %9.1f %9.1f %8d\n", name, p.mean, p.p50,
                         p.p90, p.p95, p.p99, p.max, p.count);
}

nlohmann::json ToJson(const Percentiles& p) {
  return {{"count", p.count}, {"mean", p.mean}, {"p50", p.p50}, {"p90", p.p90},
          {"p95", p.p95},     {"p99", p.p99},   {"max", p.max}};
}

}  // namespace

double Outcome::MeanGapMs() const {
  double sum = 0;
  for (const float gap : gaps_ms) sum += gap;
  return tokens > 1 ? sum / (tokens - 1) : 0;
}

bool Meets(const Outcome& outcome, const Slo& slo) {
  return outcome.status.ok() && Within(outcome.ttft, slo.ttft) &&
         Within(outcome.end, slo.end_to_end) &&
         (slo.inter_token == Duration::zero() || outcome.MeanGapMs() <= ToMillis(slo.inter_token));
}

Percentiles PercentilesOf(std::vector<double> values) {
  Percentiles p;
  if (values.empty()) return p;
  std::sort(values.begin(), values.end());
  p.count = static_cast<int64_t>(values.size());
  for (const double value : values) p.mean += value / static_cast<double>(values.size());
  p.p50 = Quantile(values, 0.50);
  p.p90 = Quantile(values, 0.90);
  p.p95 = Quantile(values, 0.95);
  p.p99 = Quantile(values, 0.99);
  p.max = values.back();
  return p;
}

LoadReport MakeReport(absl::Span<const Outcome> outcomes, absl::Span<const BitsSample> samples,
                      const Stretch& stretch, const Slo& slo) {
  LoadReport report;
  report.name = stretch.name;
  report.seconds = ToSeconds(stretch.end - stretch.begin);
  AddLatencies(outcomes, stretch, slo, report);
  AddRates(outcomes, stretch, slo, report);
  double sum = 0;
  int count = 0;
  for (const BitsSample& sample : samples) {
    if (!sample.working || !In(stretch, sample.at)) continue;
    sum += sample.loaded_bits;
    ++count;
  }
  if (count > 0) report.mean_loaded_bits = sum / count;
  return report;
}

nlohmann::json ToJson(const LoadReport& r) {
  nlohmann::json json = {
      {"name", r.name},
      {"seconds", r.seconds},
      {"requests", r.requests},
      {"by_status", r.by_status},
      {"slo_attainment", r.slo_attainment},
      {"offered_rps", r.offered_rps},
      {"completed_rps", r.completed_rps},
      {"goodput_rps", r.goodput_rps},
      {"goodput_tokens_per_second", r.goodput_tokens_per_second},
      {"tokens_per_second", r.tokens_per_second},
      {"prompt_tokens_per_second", r.prompt_tokens_per_second},
      {"cached_fraction", r.cached_fraction},
      {"mean_effective_bits", r.mean_effective_bits},
      {"ttft_ms", ToJson(r.ttft_ms)},
      {"inter_token_ms", ToJson(r.inter_token_ms)},
      {"time_per_token_ms", ToJson(r.time_per_token_ms)},
      {"end_to_end_ms", ToJson(r.end_to_end_ms)},
      {"queue_ms", ToJson(r.queue_ms)},
      {"refusal_ms", ToJson(r.refusal_ms)},
      {"lateness_ms", ToJson(r.lateness_ms)},
  };
  json["mean_loaded_bits"] =
      r.mean_loaded_bits ? nlohmann::json(*r.mean_loaded_bits) : nlohmann::json();
  return json;
}

std::string ToTable(const LoadReport& r) {
  std::string table =
      absl::StrFormat("%s: %.1f s, %d requests (%s)\n", r.name, r.seconds, r.requests,
                      absl::StrJoin(r.by_status, ", ", [](std::string* out, const auto& status) {
                        absl::StrAppend(out, status.second, " ", status.first);
                      }));
  absl::StrAppendFormat(&table, "  %-22s %9s %9s %9s %9s %9s %9s %8s\n", "ms", "mean", "p50", "p90",
                        "p95", "p99", "max", "count");
  table += Row("first token", r.ttft_ms) + Row("between tokens", r.inter_token_ms) +
           Row("per token of a request", r.time_per_token_ms) + Row("end to end", r.end_to_end_ms) +
           Row("in the queue", r.queue_ms);
  if (r.refusal_ms.count > 0) table += Row("to a refusal", r.refusal_ms);
  table += Row("sent late", r.lateness_ms);
  absl::StrAppendFormat(&table,
                        "  requests/s             offered %.2f, completed %.2f, within SLO %.2f\n"
                        "  tokens/s               completion %.1f (within SLO %.1f), prompt %.1f "
                        "(%.0f %% cached)\n"
                        "  SLO attainment         %.2f %% of all requests\n"
                        "  mean bits              effective %.3f",
                        r.offered_rps, r.completed_rps, r.goodput_rps, r.tokens_per_second,
                        r.goodput_tokens_per_second, r.prompt_tokens_per_second,
                        100 * r.cached_fraction, 100 * r.slo_attainment, r.mean_effective_bits);
  if (r.mean_loaded_bits) absl::StrAppendFormat(&table, ", loaded %.3f", *r.mean_loaded_bits);
  return table + "\n";
}

std::string ToCsv(absl::Span<const Outcome> outcomes, const Slo& slo) {
  std::string csv =
      "at_s,phase,class,status,met_slo,prompt_tokens,cached_tokens,new_tokens,tokens,late_ms,"
      "ttft_ms,time_per_token_ms,largest_gap_ms,end_to_end_ms,queue_ms,effective_bits\n";
  for (const Outcome& o : outcomes) {
    const auto largest = std::max_element(o.gaps_ms.begin(), o.gaps_ms.end());
    absl::StrAppendFormat(&csv, "%.6f,%d,%s,%s,%d,%d,%d,%d,%d,%.3f,%.3f,%.3f,%.3f,%.3f,%.3f,%.4f\n",
                          ToSeconds(o.arrival.at), o.arrival.phase, o.priority_class,
                          absl::StatusCodeToString(o.status.code()), Meets(o, slo) ? 1 : 0,
                          o.arrival.prompt_tokens, o.cached_tokens, o.arrival.new_tokens, o.tokens,
                          ToMillis(o.lateness), ToMillis(o.ttft), o.MeanGapMs(),
                          largest == o.gaps_ms.end() ? 0.0f : *largest, ToMillis(o.end), o.queue_ms,
                          o.effective_bits);
  }
  return csv;
}

}  // namespace mobi
