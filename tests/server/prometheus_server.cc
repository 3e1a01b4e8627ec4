#include "tests/server/prometheus_server.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

#include <chrono>
#include <fstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "gtest/gtest.h"
#include "server/promql.h"
#include "tests/server/loopback_server.h"

extern char** environ;

namespace mobi {
namespace {

constexpr char kProgram[] = "/usr/bin/prometheus";

}  // namespace

bool PrometheusServer::Installed() { return std::filesystem::exists(kProgram); }

PrometheusServer::PrometheusServer() {
  std::string pattern = testing::TempDir() + "prometheus-XXXXXX";
  folder_ = mkdtemp(pattern.data());
  port_ = LoopbackServer([](int) {}).port();  // free a moment ago
}

PrometheusServer::~PrometheusServer() {
  Stop();
  std::filesystem::remove_all(folder_);
}

std::string PrometheusServer::url() const { return absl::StrCat("http://127.0.0.1:", port_); }

bool PrometheusServer::Start(const std::vector<int>& ports) {
  {
    std::ofstream config(folder_ / "prometheus.yml");
    config << "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\nscrape_configs:\n";
    for (size_t i = 0; i < ports.size(); ++i) {
      config << absl::StrFormat(
          "  - {job_name: job%d, static_configs: [{targets: ['127.0.0.1:%d']}]}\n", i, ports[i]);
    }
  }
  std::vector<std::string> arguments = {
      kProgram,
      absl::StrCat("--config.file=", (folder_ / "prometheus.yml").string()),
      absl::StrCat("--storage.tsdb.path=", (folder_ / "data").string()),
      absl::StrCat("--web.listen-address=127.0.0.1:", port_),
      "--log.level=error",
  };
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 2, (folder_ / "log").c_str(), O_WRONLY | O_CREAT,
                                   0600);
  const int error = posix_spawn(&process_, kProgram, &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  const auto client = PromqlClient::Create(url());
  if (error != 0 || !client.ok()) return false;
  const std::string all_up = absl::StrFormat("count(up == 1) == %d", ports.size());
  for (int i = 0; i < 600; ++i) {
    if ((*client)->Query(all_up, std::chrono::seconds(1), nullptr).value) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  return false;
}

void PrometheusServer::Stop() {
  if (process_ <= 0) return;
  kill(process_, SIGTERM);
  waitpid(process_, nullptr, 0);
  process_ = 0;
}

}  // namespace mobi
