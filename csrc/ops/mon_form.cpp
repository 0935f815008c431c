#include "ops/mon_form.h"

#include <atomic>
#include <cstring>

namespace fastprune {
namespace {

std::atomic<MonForm> wanted{MonForm::automatic}, last{MonForm::automatic};

constexpr struct {
  const char* name;
  MonForm form;
} kNames[] = {{"auto", MonForm::automatic},
              {"by_feature", MonForm::by_feature},
              {"by_sample", MonForm::by_sample}};

}  // namespace

bool set_mon_form(const char* name) {
  for (const auto& known : kNames) {
    if (std::strcmp(known.name, name) != 0) continue;
    wanted = known.form;
    return true;
  }
  return false;
}

MonForm wanted_mon_form() { return wanted; }

void note_mon_form(MonForm form) { last = form; }

const char* last_mon_form() {
  const MonForm form = last;
  for (const auto& known : kNames) {
    if (known.form == form) return known.name;
  }
  return "";
}

}  // namespace fastprune
