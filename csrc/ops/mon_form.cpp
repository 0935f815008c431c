#include "ops/mon_form.h"

#include <atomic>
#include <cstring>

namespace fastprune {
namespace {

std::atomic<MonForm> wanted{MonForm::automatic};

}  // namespace

bool set_mon_form(const char* name) {
  const auto is = [&](const char* known) { return std::strcmp(name, known) == 0; };
  if (is("auto")) {
    wanted = MonForm::automatic;
  } else if (is("by_feature")) {
    wanted = MonForm::by_feature;
  } else if (is("by_sample")) {
    wanted = MonForm::by_sample;
  } else {
    return false;
  }
  return true;
}

MonForm wanted_mon_form() { return wanted; }

}  // namespace fastprune
