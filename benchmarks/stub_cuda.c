/* A CUDA driver that answers at once and does nothing, for timing what lies above it. */
#include <stdint.h>

typedef int Result;
typedef void *Pointer;

static int something;
static unsigned long launches;

unsigned long count_launches(void) { return launches; }

Result cuLaunchKernelEx(const void *config, Pointer function, void **arguments, void **extra) {
    launches++;
    return 0;
}
Result cuLaunchKernel(Pointer function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                      unsigned by, unsigned bz, unsigned shared, Pointer stream, void **arguments,
                      void **extra) {
    launches++;
    return 0;
}

/* Attributes of an H100: shared memory, compute capability 9.0, 132 multiprocessors, warps of 32. */
Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 97: *value = 232448; break;
        case 81: *value = 233472; break;
        case 75: *value = 9; break;
        case 76: *value = 0; break;
        case 16: *value = 132; break;
        case 10: *value = 32; break;
        default: *value = 65536;
    }
    return 0;
}
Result cuFuncGetAttribute(int *value, int attribute, Pointer function) {
    *value = attribute == 0 ? 1024 : 0;
    return 0;
}
Result cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
    *(uint64_t *)data = pointer;
    return 0;
}

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 13000; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDeviceGet(int *device, int index) { *device = index; return 0; }
Result cuCtxGetCurrent(Pointer *context) { *context = &something; return 0; }
Result cuCtxSetCurrent(Pointer context) { return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxSetLimit(int limit, uint64_t value) { return 0; }
Result cuCtxGetLimit(uint64_t *value, int limit) { *value = 0; return 0; }
Result cuDevicePrimaryCtxRetain(Pointer *context, int device) { *context = &something; return 0; }
Result cuModuleLoadData(Pointer *module, const void *data) { *module = &something; return 0; }
Result cuModuleUnload(Pointer module) { return 0; }
Result cuModuleGetFunction(Pointer *f, Pointer module, const char *name) { *f = &something; return 0; }
Result cuFuncSetAttribute(Pointer function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(Pointer function, int config) { return 0; }
Result cuGetErrorString(Result error, const char **text) { *text = "none"; return 0; }
Result cuOccupancyMaxActiveClusters(int *n, Pointer f, const void *config) { *n = 66; return 0; }
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }
