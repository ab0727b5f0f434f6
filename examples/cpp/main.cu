// Runs an emitted kernel on vectors that make_vectors.py wrote, and holds the result to the project's tolerance.
//   usage: run VECTORS
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include <cuda_runtime.h>

extern "C" size_t marlin_workspace_bytes();
extern "C" int marlin_launch(const unsigned short* act, const unsigned int* codes, const unsigned int* meta,
                             const unsigned short* scales, const unsigned short* bias, unsigned short* out,
                             float4* workspace, int* tickets, int m, int n, int k, int act_stride, cudaStream_t stream);

static void check(int error, const char* what) {
    if (error != cudaSuccess) {
        std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(static_cast<cudaError_t>(error)));
        std::exit(1);
    }
}

template <class T>
static std::vector<T> read(const std::string& path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) {
        std::fprintf(stderr, "cannot read %s; write it with make_vectors.py\n", path.c_str());
        std::exit(1);
    }
    std::vector<T> values(static_cast<size_t>(file.tellg()) / sizeof(T));
    file.seekg(0);
    file.read(reinterpret_cast<char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
    return values;
}

template <class T>
static T* upload(const std::vector<T>& values) {
    void* pointer = nullptr;
    check(cudaMalloc(&pointer, values.size() * sizeof(T) + 16), "cudaMalloc");
    check(cudaMemcpy(pointer, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    return static_cast<T*>(pointer);
}

static float half_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float sign = bits & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(1.0f * mantissa, -24));
}

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s VECTORS\n", argv[0]);
        return 1;
    }
    const std::string folder = std::string(argv[1]) + "/";
    const auto shape = read<int32_t>(folder + "shape");  // m, n, k
    const int m = shape[0], n = shape[1], k = shape[2];
    const auto reference = read<double>(folder + "reference"), bound = read<double>(folder + "bound");
    const auto act = read<uint16_t>(folder + "act"), scales = read<uint16_t>(folder + "scales");
    const auto codes = read<uint32_t>(folder + "codes"), meta = read<uint32_t>(folder + "meta");

    std::vector<uint16_t> out(static_cast<size_t>(m) * n, 0xffff);  // NaN
    uint16_t* device_out = upload(out);
    int* tickets = nullptr;
    void* workspace = nullptr;
    check(cudaMalloc(&workspace, marlin_workspace_bytes()), "cudaMalloc");
    check(cudaMalloc(&tickets, 4096 * sizeof(int)), "cudaMalloc");
    check(cudaMemset(tickets, 0, 4096 * sizeof(int)), "cudaMemset");
    const uint16_t *device_act = upload(act), *device_scales = upload(scales);
    const uint32_t *device_codes = upload(codes), *device_meta = upload(meta);
    for (int i = 0; i < 3; ++i) {  // the tickets of one launch serve the next
        check(marlin_launch(device_act, device_codes, device_meta, device_scales, nullptr, device_out,
                            static_cast<float4*>(workspace), tickets, m, n, k, k, nullptr),
              "marlin_launch");
    }
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    check(cudaMemcpy(out.data(), device_out, out.size() * sizeof(uint16_t), cudaMemcpyDeviceToHost), "cudaMemcpy");

    size_t bad = 0;
    double worst = 0.0;
    for (size_t i = 0; i < out.size(); ++i) {
        const double error = std::fabs(half_to_float(out[i]) - reference[i]);
        if (!(error <= bound[i])) ++bad;
        worst = std::fmax(worst, error / bound[i]);
    }
    std::printf("M=%d N=%d K=%d: %zu of %zu values outside of the tolerance, largest error %.2f of it\n", m, n, k, bad,
                out.size(), worst);
    return bad != 0;
}
