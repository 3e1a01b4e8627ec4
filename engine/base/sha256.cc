#include "engine/base/sha256.h"

#include <openssl/evp.h>

#include <cstdlib>

#include "engine/base/mapped_file.h"
#include "engine/base/status_macros.h"

namespace mobi {

// OpenSSL fails here only without memory or with a broken installation: nothing to recover.
Sha256::Sha256() : context_(EVP_MD_CTX_new()) {
  if (context_ == nullptr || EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1) abort();
}

void Sha256::Deleter::operator()(evp_md_ctx_st* context) const { EVP_MD_CTX_free(context); }

void Sha256::Update(absl::Span<const std::byte> bytes) {
  if (EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size()) != 1) abort();
}

std::string Sha256::HexDigest() {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int length = 0;
  if (EVP_DigestFinal_ex(context_.get(), digest, &length) != 1) abort();
  std::string hex;
  for (unsigned int i = 0; i < length; ++i) {
    hex += "0123456789abcdef"[digest[i] >> 4];
    hex += "0123456789abcdef"[digest[i] & 15];
  }
  return hex;
}

absl::StatusOr<std::string> Sha256OfFile(const std::string& path, uint64_t max_bytes) {
  MOBI_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path, max_bytes));
  Sha256 hash;
  hash.Update(file.bytes());
  return hash.HexDigest();
}

}  // namespace mobi
