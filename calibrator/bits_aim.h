// What to ask for so that the windows of an evaluation use the average bits that were wanted: the
// price table was measured on other text, so what windows have missed by so far is asked for on
// top, and what they owe in all is paid back over the next ones. The server's inner loop holds
// seconds (bits_tracker.h there); this one holds the mean of a text. Plain arithmetic.
#ifndef MOBI_CALIBRATOR_BITS_AIM_H_
#define MOBI_CALIBRATOR_BITS_AIM_H_

namespace mobi {

class BitsAim {
 public:
  // `in_flight`: windows that are asked for before the first of them is seen.
  BitsAim(float wanted, int in_flight) : wanted_(wanted), repaid_over_(2 * in_flight) {}

  // Within 2 and 8 bits; those two are met exactly and asked for as they are.
  float Next() const;
  // One window that was asked for `asked` bits used `used`.
  void Saw(double asked, double used);

 private:
  const float wanted_;
  const int repaid_over_;  // windows
  int seen_ = 0;
  double missed_ = 0;  // sum of asked less used
  double owed_ = 0;    // sum of wanted less used
};

}  // namespace mobi

#endif  // MOBI_CALIBRATOR_BITS_AIM_H_
