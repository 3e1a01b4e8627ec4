// Debian's Prometheus on loopback, for tests: scrapes metrics endpoints every 200 ms.
#ifndef MOBI_TESTS_SERVER_PROMETHEUS_SERVER_H_
#define MOBI_TESTS_SERVER_PROMETHEUS_SERVER_H_

#include <sys/types.h>

#include <filesystem>
#include <string>
#include <vector>

namespace mobi {

class PrometheusServer {
 public:
  static bool Installed();

  // Has an address; nothing runs yet.
  PrometheusServer();
  ~PrometheusServer();
  PrometheusServer(const PrometheusServer&) = delete;
  PrometheusServer& operator=(const PrometheusServer&) = delete;

  std::string url() const;
  // True once it has scraped all of these ports of loopback, each a job of its own. Also after
  // Stop.
  bool Start(const std::vector<int>& ports);
  void Stop();

 private:
  std::filesystem::path folder_;
  int port_ = 0;
  pid_t process_ = 0;
};

}  // namespace mobi

#endif  // MOBI_TESTS_SERVER_PROMETHEUS_SERVER_H_
