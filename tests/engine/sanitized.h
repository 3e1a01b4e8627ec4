// Whether this build runs under a sanitizer: it is slow then, and memory is not what it would be.
#ifndef MOBI_TESTS_ENGINE_SANITIZED_H_
#define MOBI_TESTS_ENGINE_SANITIZED_H_

namespace mobi {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

}  // namespace mobi

#endif  // MOBI_TESTS_ENGINE_SANITIZED_H_
