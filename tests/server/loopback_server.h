// A TCP listener on loopback that does to every connection what a test wants: for servers that are
// slow, broken or hostile, which real ones cannot be asked to be. One connection at a time.
#ifndef MOBI_TESTS_SERVER_LOOPBACK_SERVER_H_
#define MOBI_TESTS_SERVER_LOOPBACK_SERVER_H_

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <functional>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"

namespace mobi {

class LoopbackServer {
 public:
  // `serve` reads and writes the connection, which is closed after it.
  explicit LoopbackServer(std::function<void(int fd)> serve) : serve_(std::move(serve)) {
    fd_ = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    (void)bind(fd_, reinterpret_cast<sockaddr*>(&address), size);
    listen(fd_, 8);
    getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { Run(); });
  }
  ~LoopbackServer() {
    shutdown(fd_, SHUT_RDWR);
    thread_.join();
    close(fd_);
  }

  int port() const { return port_; }
  std::string url() const { return absl::StrCat("http://127.0.0.1:", port_); }

  // Reads a request's head, so that closing does not reset the connection.
  static void ReadRequest(int fd) {
    char buffer[4096];
    if (recv(fd, buffer, sizeof(buffer), 0) < 0) return;
  }
  static void Write(int fd, const std::string& text) {
    size_t sent = 0;
    while (sent < text.size()) {
      const ssize_t count = send(fd, text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
      if (count <= 0) return;
      sent += static_cast<size_t>(count);
    }
  }
  static std::string Http(int status, const std::string& body) {
    return absl::StrCat("HTTP/1.1 ", status, " x\r\nContent-Length: ", body.size(),
                        "\r\nConnection: close\r\n\r\n", body);
  }

 private:
  void Run() {
    for (;;) {
      const int connection = accept(fd_, nullptr, nullptr);
      if (connection < 0) return;
      serve_(connection);
      close(connection);
    }
  }

  const std::function<void(int)> serve_;
  int fd_ = -1;
  int port_ = 0;
  std::thread thread_;
};

}  // namespace mobi

#endif  // MOBI_TESTS_SERVER_LOOPBACK_SERVER_H_
