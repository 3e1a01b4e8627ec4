#include "tests/server/certificates.h"

#include <gtest/gtest.h>
#include <openssl/ec.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>

#include <atomic>
#include <memory>

namespace mobi {
namespace {

using Bio = std::unique_ptr<BIO, decltype(&BIO_free)>;
using Key = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;
using X509Ptr = std::unique_ptr<X509, decltype(&X509_free)>;

Bio NewBio() { return {BIO_new(BIO_s_mem()), BIO_free}; }
Bio BioOf(const std::string& pem) {
  return {BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())), BIO_free};
}

std::string TextOf(const Bio& bio) {
  char* data = nullptr;
  const long size = BIO_get_mem_data(bio.get(), &data);
  return std::string(data, static_cast<size_t>(size));
}

void Extend(X509* cert, X509* issuer, int nid, const std::string& value) {
  X509V3_CTX context;
  X509V3_set_ctx_nodb(&context);
  X509V3_set_ctx(&context, issuer, cert, nullptr, nullptr, 0);
  X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, nid, value.c_str());
  ASSERT_NE(extension, nullptr) << value;
  X509_add_ext(cert, extension, -1);
  X509_EXTENSION_free(extension);
}

X509Ptr NewX509(const std::string& name, EVP_PKEY* key, long seconds) {
  static std::atomic<long> serial{1};
  X509Ptr cert(X509_new(), X509_free);
  X509_set_version(cert.get(), X509_VERSION_3);
  ASN1_INTEGER_set(X509_get_serialNumber(cert.get()), serial++);
  X509_gmtime_adj(X509_getm_notBefore(cert.get()), -3600);
  X509_gmtime_adj(X509_getm_notAfter(cert.get()), seconds);
  X509_set_pubkey(cert.get(), key);
  X509_NAME_add_entry_by_txt(X509_get_subject_name(cert.get()), "CN", MBSTRING_ASC,
                             reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
  return cert;
}

TestCertificate Pem(X509* cert, EVP_PKEY* key) {
  const Bio cert_bio = NewBio();
  const Bio key_bio = NewBio();
  PEM_write_bio_X509(cert_bio.get(), cert);
  PEM_write_bio_PrivateKey(key_bio.get(), key, nullptr, nullptr, 0, nullptr, nullptr);
  return {TextOf(cert_bio), TextOf(key_bio)};
}

}  // namespace

TestCertificate MakeAuthority(const std::string& name) {
  const Key key(EVP_EC_gen("P-256"), EVP_PKEY_free);
  const X509Ptr cert = NewX509(name, key.get(), 3600);
  X509_set_issuer_name(cert.get(), X509_get_subject_name(cert.get()));
  Extend(cert.get(), cert.get(), NID_basic_constraints, "critical,CA:TRUE");
  EXPECT_GT(X509_sign(cert.get(), key.get(), EVP_sha256()), 0);
  return Pem(cert.get(), key.get());
}

TestCertificate MakeCertificate(const TestCertificate& authority, const std::string& alt_names,
                                long seconds) {
  const X509Ptr issuer(PEM_read_bio_X509(BioOf(authority.cert).get(), nullptr, nullptr, nullptr),
                       X509_free);
  const Key issuer_key(
      PEM_read_bio_PrivateKey(BioOf(authority.key).get(), nullptr, nullptr, nullptr),
      EVP_PKEY_free);
  const Key key(EVP_EC_gen("P-256"), EVP_PKEY_free);
  const X509Ptr cert = NewX509("test", key.get(), seconds);
  X509_set_issuer_name(cert.get(), X509_get_subject_name(issuer.get()));
  Extend(cert.get(), issuer.get(), NID_subject_alt_name, alt_names);
  EXPECT_GT(X509_sign(cert.get(), issuer_key.get(), EVP_sha256()), 0);
  return Pem(cert.get(), key.get());
}

}  // namespace mobi
