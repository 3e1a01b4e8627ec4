// Whether this build runs under a sanitizer: it is slow then, and memory is not what it would be.
#ifndef MOBI_TESTS_ENGINE_SANITIZED_H_
#define MOBI_TESTS_ENGINE_SANITIZED_H_

namespace mobi {

#ifdef MOBI_SANITIZED
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

}  // namespace mobi

#endif  // MOBI_TESTS_ENGINE_SANITIZED_H_
