#include "server/latency_window.h"

#include <algorithm>

namespace mobi {

void LatencyWindow::Add(TimePoint now, const LatencyCounts& counts) {
  latest_ = {now, counts};
  if (snapshots_.empty() || now - snapshots_.back().time >= options_.spacing) {
    snapshots_.push_back(latest_);
  }
  while (snapshots_.size() > 1 && now - snapshots_[1].time >= options_.longest) {
    snapshots_.pop_front();
  }
}

std::optional<double> LatencyWindow::QuantileSeconds(double q, Duration span) const {
  return FreshQuantileSeconds(q, 1, span, span);
}

std::optional<double> LatencyWindow::FreshQuantileSeconds(double q, uint64_t enough, Duration least,
                                                          Duration most) const {
  LatencyCounts recent;
  for (auto snapshot = snapshots_.rbegin(); snapshot != snapshots_.rend(); ++snapshot) {
    const Duration age = latest_.time - snapshot->time;
    if (age > most) break;
    recent = latest_.counts.Since(snapshot->counts);
    if (age >= least && recent.total() >= enough) break;
  }
  if (recent.total() == 0) return std::nullopt;
  return recent.QuantileSeconds(q);
}

}  // namespace mobi
