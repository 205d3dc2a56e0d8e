// Permutations for eight lanes, by the byte of a bitmap that says which lanes are kept.
#pragma once

#include <cstdint>

namespace ebft {

struct LaneTables {
  uint8_t expand[256][8];    // lane i takes stored entry expand[byte][i]: how many kept lanes stand before it
  uint8_t compress[256][8];  // stored entry j comes from lane compress[byte][j]; lanes past the last: any
  uint8_t count[256];
};

constexpr LaneTables make_lane_tables() {
  LaneTables tables{};
  for (int byte = 0; byte < 256; ++byte) {
    int kept = 0;
    for (int lane = 0; lane < 8; ++lane) {
      tables.expand[byte][lane] = static_cast<uint8_t>(kept);
      if (byte >> lane & 1) tables.compress[byte][kept++] = static_cast<uint8_t>(lane);
    }
    for (int lane = 0; lane < 8; ++lane) tables.expand[byte][lane] &= 7;
    tables.count[byte] = static_cast<uint8_t>(kept);
  }
  return tables;
}

inline constexpr LaneTables kLanes = make_lane_tables();

}  // namespace ebft
