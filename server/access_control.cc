#include "server/access_control.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/base/status_macros.h"

namespace mobi {
namespace {

constexpr size_t kMaxTokens = 1024;  // each is compared with at every call
constexpr absl::string_view kScheme = "Bearer ";

std::array<uint8_t, 32> Sha256Of(std::string_view text) {
  std::array<uint8_t, 32> digest;
  SHA256(reinterpret_cast<const uint8_t*>(text.data()), text.size(), digest.data());
  return digest;
}

absl::StatusOr<uint8_t> ParseScopes(absl::string_view text) {
  uint8_t scopes = 0;
  for (const absl::string_view name : absl::StrSplit(text, ',')) {
    if (name == "generate") {
      scopes |= static_cast<uint8_t>(Scope::kGenerate);
    } else if (name == "admin") {
      scopes |= static_cast<uint8_t>(Scope::kAdmin);
    } else {
      return absl::InvalidArgumentError(
          absl::StrCat("scope \"", absl::CHexEscape(name), "\" is neither generate nor admin"));
    }
  }
  return scopes;
}

absl::StatusOr<AccessToken> ParseToken(absl::string_view line) {
  const std::vector<absl::string_view> fields =
      absl::StrSplit(line, absl::ByAnyChar(" \t"), absl::SkipEmpty());
  // The line itself may hold a token by mistake, so it is not repeated.
  if (fields.size() != 3) {
    return absl::InvalidArgumentError(
        absl::StrCat("has ", fields.size(), " fields, not name, scopes and SHA-256"));
  }
  AccessToken token{.name = std::string(fields[0])};
  MOBI_ASSIGN_OR_RETURN(token.scopes, ParseScopes(fields[1]));
  const bool hex = std::all_of(fields[2].begin(), fields[2].end(), absl::ascii_isxdigit);
  if (fields[2].size() != 2 * token.sha256.size() || !hex) {
    return absl::InvalidArgumentError("the third field is not a SHA-256 of 64 hex digits");
  }
  const std::string digest = absl::HexStringToBytes(fields[2]);
  std::copy(digest.begin(), digest.end(), token.sha256.begin());
  return token;
}

}  // namespace

absl::StatusOr<std::vector<AccessToken>> ParseAccessTokens(std::string_view text,
                                                           const std::string& path) {
  std::vector<AccessToken> tokens;
  int number = 0;
  for (absl::string_view line : absl::StrSplit(absl::string_view(text.data(), text.size()), '\n')) {
    ++number;
    line = absl::StripAsciiWhitespace(line.substr(0, line.find('#')));
    if (line.empty()) continue;
    auto token = ParseToken(line);
    if (!token.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ":", number, ": ", token.status().message()));
    }
    tokens.push_back(*std::move(token));
  }
  if (tokens.empty()) {
    return absl::InvalidArgumentError(path + ": has no token, so nobody could call");
  }
  if (tokens.size() > kMaxTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": has ", tokens.size(), " tokens, at most ", kMaxTokens, " are taken"));
  }
  return tokens;
}

absl::StatusOr<std::unique_ptr<AccessControl>> AccessControl::Open(const std::string& path) {
  std::unique_ptr<AccessControl> access(new AccessControl(path));
  if (access->enabled()) MOBI_RETURN_IF_ERROR(access->Reload().status());
  return access;
}

absl::Status AccessControl::Check(const grpc::ServerContextBase& context, Scope scope) const {
  if (!enabled()) return absl::OkStatus();
  const auto& metadata = context.client_metadata();
  const auto found = metadata.find("authorization");
  if (found == metadata.end()) return CheckHeader(std::nullopt, scope);
  return CheckHeader(std::string_view(found->second.data(), found->second.size()), scope);
}

absl::Status AccessControl::CheckHeader(std::optional<std::string_view> authorization,
                                        Scope scope) const {
  if (!enabled()) return absl::OkStatus();
  const absl::string_view header =
      authorization ? absl::string_view(authorization->data(), authorization->size()) : "";
  if (!absl::StartsWithIgnoreCase(header, kScheme)) {
    return absl::UnauthenticatedError("this server wants a bearer token in `authorization`");
  }
  const auto digest = Sha256Of({header.data() + kScheme.size(), header.size() - kScheme.size()});
  // Every token is compared with, each in constant time: how long it takes tells nothing.
  bool known = false;
  uint8_t scopes = 0;
  MutexLock lock(mutex_);
  for (const AccessToken& token : tokens_) {
    const bool same = CRYPTO_memcmp(token.sha256.data(), digest.data(), digest.size()) == 0;
    known |= same;
    scopes |= same ? token.scopes : 0;
  }
  if (!known) return absl::UnauthenticatedError("the bearer token is not known");
  if ((scopes & static_cast<uint8_t>(scope)) != 0) return absl::OkStatus();
  return absl::PermissionDeniedError(absl::StrCat("the bearer token lacks the scope ",
                                                  scope == Scope::kAdmin ? "admin" : "generate"));
}

absl::StatusOr<bool> AccessControl::Reload() {
  if (!enabled()) return false;
  MOBI_ASSIGN_OR_RETURN(const auto texts, file_.Read());
  if (!texts) return false;
  MOBI_ASSIGN_OR_RETURN(auto tokens, ParseAccessTokens(texts->front(), path_));
  MutexLock lock(mutex_);
  tokens_ = std::move(tokens);
  return true;
}

}  // namespace mobi
