// SHA-256 (FIPS 180-4) by OpenSSL, for MANIFEST. One object hashes one message; not thread-safe.
#ifndef MOBI_ENGINE_BASE_SHA256_H_
#define MOBI_ENGINE_BASE_SHA256_H_

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

struct evp_md_ctx_st;

namespace mobi {

class Sha256 {
 public:
  Sha256();

  void Update(absl::Span<const std::byte> bytes);
  // 64 lowercase hexadecimal digits; ends the message.
  std::string HexDigest();

 private:
  struct Deleter {
    void operator()(evp_md_ctx_st* context) const;
  };
  std::unique_ptr<evp_md_ctx_st, Deleter> context_;
};

// The digest of a file's contents, errors as MappedFile::Open's.
absl::StatusOr<std::string> Sha256OfFile(const std::string& path,
                                         uint64_t max_bytes = std::numeric_limits<int64_t>::max());

}  // namespace mobi

#endif  // MOBI_ENGINE_BASE_SHA256_H_
