// Stands in for the CUDA runtime under an emitted file: its launcher runs, its kernels do not. The last launch is kept.
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include <cuda.h>
#include <cuda_runtime.h>

namespace {

struct Launch {
    char entry[128];
    unsigned grid, threads, smem_bytes, opted_smem_bytes, pdl, cluster, spread;
    void* stream;
    char arguments[1024];  // packed by the signature
} last;
std::string signature;
int multiprocessors;
std::map<const void*, int> opted;

// Why a function: kernels are registered before the objects of this file are made.
std::map<const void*, std::string>& entries() {
    static std::map<const void*, std::string> names;
    return names;
}

void record(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t smem, cudaStream_t stream) {
    last = {};
    std::strncpy(last.entry, entries().at(kernel).c_str(), sizeof(last.entry) - 1);
    last.grid = grid.x * grid.y * grid.z, last.threads = block.x * block.y * block.z;
    last.smem_bytes = static_cast<unsigned>(smem), last.opted_smem_bytes = opted[kernel], last.stream = stream;
    char* to = last.arguments;
    for (const char code : signature) {
        const size_t bytes = code == 'T' ? 128 : code == 'P' ? 8 : 4;
        std::memcpy(to, *arguments++, bytes);
        to += bytes;
    }
}

// Writes down what it is asked for, as `encode_map` of machine.py does.
CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* extents,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    const bool words = type == CU_TENSOR_MAP_DATA_TYPE_UINT64;
    if (rank != 3 || steps[0] != 1 || steps[1] != 1 || steps[2] != 1 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
        swizzle != (words ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B) ||
        promotion != CU_TENSOR_MAP_L2_PROMOTION_L2_256B || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (reinterpret_cast<size_t>(data) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    char* to = reinterpret_cast<char*>(map);
    std::memset(to, 0, sizeof(*map));
    const unsigned size = words ? 8 : 2, swizzled = words ? 0 : 1;
    std::memcpy(to, &data, 8), std::memcpy(to + 8, extents, 24), std::memcpy(to + 32, strides, 16);
    std::memcpy(to + 48, box, 12), std::memcpy(to + 60, &size, 4), std::memcpy(to + 64, &swizzled, 4);
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

const Launch* last_launch() { return &last; }
void expect(const char* arguments, int sms) { signature = arguments, multiprocessors = sms; }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    if (attribute != cudaDevAttrMultiProcessorCount) std::abort();
    return *value = multiprocessors, cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
    return opted[kernel] = value, cudaSuccess;
}
// Blocks that fit beside each other by shared memory, of which the driver takes a part for itself.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t smem, unsigned) {
    constexpr size_t kAll = 233472, kStatic = 128, kDriver = 1024;
    return *blocks = static_cast<int>(kAll / (smem + kStatic + kDriver)), cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    if (std::string(symbol) != "cuTensorMapEncodeTiled") return cudaErrorInvalidValue;
    *found = reinterpret_cast<void*>(&encode), *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
    record(kernel, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream);
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        const cudaLaunchAttributeValue& value = config->attrs[i].val;
        switch (config->attrs[i].id) {
            case cudaLaunchAttributeProgrammaticStreamSerialization:
                last.pdl = value.programmaticStreamSerializationAllowed;
                break;
            case cudaLaunchAttributeClusterDimension:
                if (value.clusterDim.y != 1 || value.clusterDim.z != 1) return cudaErrorInvalidValue;
                last.cluster = value.clusterDim.x;
                break;
            case cudaLaunchAttributeClusterSchedulingPolicyPreference:
                last.spread = value.clusterSchedulingPolicyPreference == cudaClusterSchedulingPolicySpread;
                break;
            default:
                return cudaErrorInvalidValue;
        }
    }
    return cudaSuccess;
}

// What nvcc makes of the kernels and of <<<>>>.
struct Configuration {
    dim3 grid, block;
    size_t smem;
    void* stream;
} pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t smem, void* stream) {
    return pushed = {grid, block, smem, stream}, 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* smem, void* stream) {
    *grid = pushed.grid, *block = pushed.block, *smem = pushed.smem, *static_cast<void**>(stream) = pushed.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* entry) {
    *kernel = static_cast<cudaKernel_t>(const_cast<void*>(entry));
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t smem,
                               cudaStream_t stream) {
    record(kernel, grid, block, arguments, smem, stream);
    return cudaSuccess;
}
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
    entries()[host] = name;
}

}  // extern "C"
