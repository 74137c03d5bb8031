// Compares a kernel's outputs with dsv3's test vectors. Needs a C++17 compiler and nothing else.
//
//   g++ -std=c++17 -O2 compare.cpp -o compare && ./compare VECTORS OUTPUTS
//
// VECTORS is what `dsv3 conformance export` wrote. OUTPUTS/<op>/<case>/output_<i>.pb are the kernel's results as ONNX
// TensorProto files, floats in any floating-point type. An element passes if |found - expected| <= mag, where mag_<i>.pb
// holds the allowed error (infinite: anything goes; no file: exact). Exit code: 0 all passed, 1 not, 2 usage or bad file.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace fs = std::filesystem;
using Bytes = std::string;

static Bytes slurp(const fs::path& path) {
  std::ifstream f(path, std::ios::binary);
  if (!f) throw std::runtime_error(path.string() + " is missing");
  return Bytes(std::istreambuf_iterator<char>(f), {});
}

struct Reader {  // the protobuf wire format
  const Bytes& b;
  size_t at = 0;
  bool more() const { return at < b.size(); }
  uint64_t varint() {
    uint64_t v = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (at >= b.size()) throw std::runtime_error("truncated protobuf");
      uint8_t c = b[at++];
      v |= uint64_t(c & 0x7F) << shift;
      if (!(c & 0x80)) return v;
    }
    throw std::runtime_error("malformed protobuf");
  }
  Bytes take(uint64_t n) {
    if (n > b.size() - at) throw std::runtime_error("truncated protobuf");
    at += n;
    return b.substr(at - n, n);
  }
};

struct Tensor {
  std::vector<int64_t> dims;
  int type = 0;  // TensorProto.DataType
  std::vector<double> values;
  bool integer() const { return type == 2 || type == 3 || type == 6 || type == 7 || type == 9; }
};

static double small_float(uint32_t bits, int exponent_bits, int mantissa_bits, int bias, bool infinite) {
  uint32_t mantissa = bits & ((1u << mantissa_bits) - 1), top = (1u << exponent_bits) - 1;
  uint32_t exponent = (bits >> mantissa_bits) & top;
  double sign = (bits >> (mantissa_bits + exponent_bits)) & 1 ? -1 : 1;
  if (infinite && exponent == top) return mantissa ? NAN : sign * INFINITY;
  double m = mantissa / double(1u << mantissa_bits);
  return sign * (exponent ? std::ldexp(1 + m, int(exponent) - bias) : std::ldexp(m, 1 - bias));
}

static double decode(int type, uint32_t u) {  // types of at most 16 bits, from their bits
  switch (type) {
    case 2: case 9: return uint8_t(u);
    case 3: return int8_t(u);
    case 10: return small_float(u & 0xFFFF, 5, 10, 15, true);
    case 16: return small_float(u & 0xFFFF, 8, 7, 127, true);
    case 17: return (u & 0x7F) == 0x7F ? NAN : small_float(u & 0xFF, 4, 3, 7, false);
    case 18: return (u & 0xFF) == 0x80 ? NAN : small_float(u & 0xFF, 4, 3, 8, false);
    case 19: return small_float(u & 0xFF, 5, 2, 15, true);
  }
  throw std::runtime_error("element type " + std::to_string(type) + " is not one of the vectors'");
}

template <class T>
static void append(std::vector<double>& out, const Bytes& raw) {
  for (size_t i = 0; i + sizeof(T) <= raw.size(); i += sizeof(T)) {
    T v;
    std::memcpy(&v, raw.data() + i, sizeof(T));
    out.push_back(double(v));
  }
}

static void decode_raw(Tensor& t, const Bytes& raw) {  // little-endian, as the machines this runs on
  if (t.type == 1) return append<float>(t.values, raw);
  if (t.type == 6) return append<int32_t>(t.values, raw);
  if (t.type == 7) return append<int64_t>(t.values, raw);
  if (t.type == 11) return append<double>(t.values, raw);
  size_t width = t.type == 10 || t.type == 16 ? 2 : 1;
  for (size_t i = 0; i + width <= raw.size(); i += width)
    t.values.push_back(decode(t.type, uint8_t(raw[i]) | (width == 2 ? uint32_t(uint8_t(raw[i + 1])) << 8 : 0)));
}

static Tensor read_tensor(const fs::path& path) {
  const Bytes bytes = slurp(path);
  Tensor t;
  Bytes raw, floats, doubles;
  std::vector<uint64_t> integers;
  for (Reader r{bytes}; r.more();) {
    uint64_t key = r.varint(), field = key >> 3, wire = key & 7;
    Bytes chunk;
    uint64_t number = 0;
    if (wire == 0) number = r.varint();
    else if (wire == 1) chunk = r.take(8);
    else if (wire == 5) chunk = r.take(4);
    else if (wire == 2) chunk = r.take(r.varint());
    else throw std::runtime_error(path.string() + " is no TensorProto");
    if (field == 2) t.type = int(number);
    else if (field == 4) floats += chunk;
    else if (field == 9) raw = chunk;
    else if (field == 10) doubles += chunk;
    else if (field == 1 || field == 5 || field == 7) {
      std::vector<uint64_t> found;
      if (wire == 0) found.push_back(number);
      else for (Reader inner{chunk}; inner.more();) found.push_back(inner.varint());
      for (uint64_t v : found) {
        if (field == 1) t.dims.push_back(int64_t(v));
        else integers.push_back(v);
      }
    }
  }
  decode_raw(t, raw);
  append<float>(t.values, floats);
  append<double>(t.values, doubles);
  for (uint64_t v : integers) t.values.push_back(t.type == 6 || t.type == 7 ? double(int64_t(v)) : decode(t.type, uint32_t(v)));
  int64_t count = std::accumulate(t.dims.begin(), t.dims.end(), int64_t(1), std::multiplies<int64_t>());
  if (count != int64_t(t.values.size())) throw std::runtime_error(path.string() + ": data and dims disagree");
  return t;
}

static void sort_rows(Tensor& t, const Tensor& ids) {  // each row by ascending id
  size_t k = ids.dims.empty() || !ids.dims.back() ? 1 : size_t(ids.dims.back());
  std::vector<double> sorted;
  for (size_t row = 0; row + k <= ids.values.size(); row += k) {
    std::vector<size_t> order(k);
    std::iota(order.begin(), order.end(), size_t(0));
    auto id = ids.values.begin() + row;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return id[a] < id[b]; });
    for (size_t j : order) sorted.push_back(t.values[row + j]);
  }
  t.values = sorted;
}

static std::string mistake(const Tensor& y, const Tensor& e, const Tensor* mag, double cap) {  // "" if nothing is wrong
  if (y.dims != e.dims) return "wrong shape";
  if (y.integer() != e.integer()) return "wrong element type";
  double error2 = 0, power = 0;
  for (size_t i = 0; i < e.values.size(); ++i) {
    double found = y.values[i], want = e.values[i], limit = mag ? mag->values[i] : 0;
    if (limit == INFINITY) continue;
    bool same = found == want || (std::isnan(found) && std::isnan(want));
    if (!same && !(std::fabs(found - want) <= limit)) {
      char text[160];
      std::snprintf(text, sizeof text, "element %zu: found %.9g, expected %.9g, allowed error %.3g", i, found, want, limit);
      return text;
    }
    if (!std::isfinite(found) || !std::isfinite(want)) continue;
    error2 += (found - want) * (found - want);
    power += want * want;
  }
  if (mag && !e.integer() && power > 0 && error2 / power > cap) return "mean squared error over mean square " + std::to_string(error2 / power);
  return "";
}

static std::string compare(const fs::path& vector, const fs::path& outputs) {
  const std::string budget = slurp(vector / "budget.json");
  size_t at = budget.find("\"nmse_cap\":");
  double cap = INFINITY;
  if (at != std::string::npos && budget.compare(budget.find_first_not_of(' ', at + 11), 4, "null"))
    cap = std::strtod(budget.c_str() + at + 11, nullptr);
  const fs::path data = vector / "test_data_set_0";
  std::vector<Tensor> y, e, mags;
  std::vector<bool> has_mag;
  for (int i = 0; fs::exists(data / ("output_" + std::to_string(i) + ".pb")); ++i) {
    const std::string n = std::to_string(i) + ".pb";
    e.push_back(read_tensor(data / ("output_" + n)));
    y.push_back(read_tensor(outputs / ("output_" + n)));
    has_mag.push_back(fs::exists(data / ("mag_" + n)));
    mags.push_back(has_mag.back() ? read_tensor(data / ("mag_" + n)) : Tensor{});
    if (has_mag.back() && mags.back().dims != e.back().dims) throw std::runtime_error("mag_" + n + ": wrong shape");
  }
  if (budget.find("\"order\": \"any\"") != std::string::npos && y[0].dims == e[0].dims && y[1].dims == e[1].dims) {
    if (has_mag[0]) sort_rows(mags[0], e[1]);
    for (auto* side : {&y, &e}) {
      sort_rows((*side)[0], (*side)[1]);
      sort_rows((*side)[1], Tensor((*side)[1]));
    }
  }
  for (size_t i = 0; i < e.size(); ++i) {
    const std::string text = mistake(y[i], e[i], has_mag[i] ? &mags[i] : nullptr, cap);
    if (!text.empty()) return "output " + std::to_string(i) + ": " + text;
  }
  return "";
}

int main(int argc, char** argv) try {
  if (argc != 3) throw std::runtime_error("usage: compare VECTORS OUTPUTS");
  std::vector<fs::path> found;
  for (const auto& entry : fs::recursive_directory_iterator(argv[1]))
    if (entry.path().filename() == "budget.json") found.push_back(entry.path().parent_path());
  if (found.empty()) throw std::runtime_error(std::string(argv[1]) + " holds no vectors (no budget.json)");
  std::sort(found.begin(), found.end());
  int failed = 0;
  for (const auto& vector : found) {
    const fs::path name = fs::relative(vector, argv[1]);
    std::string text;
    try {
      text = compare(vector, argv[2] / name);
    } catch (const std::exception& error) {
      text = error.what();
    }
    failed += !text.empty();
    std::printf("%-4s  %s  %s\n", text.empty() ? "ok" : "FAIL", name.string().c_str(), text.c_str());
  }
  std::printf("%d of %d passed\n", int(found.size()) - failed, int(found.size()));
  return failed ? 1 : 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
}
