// A GPU that computes nothing: the functions of CUDA's runtime, driver, cuBLAS and cuDNN that fill something in, for one
// pretended H100 of NULLGPU_GB GiB (default 79). Memory, streams, launches, copies and graphs succeed and are counted; no
// kernel runs, device memory reads as zeros. Every other function that PyTorch links to is made by build.py and returns 0.
//
// Preloaded, these take the place of the real libraries' functions. Only types come from CUDA's headers: definitions are
// loose (`int f()` takes whatever it is given) where nothing has to be read. One device, one capture at a time.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <driver_types.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define API __attribute__((visibility("default")))
#define NEW(name) API int name(void **out) { *out = calloc(1, 256); return 0; }
#define LAUNCH(name) API int name() { return launched(); }

enum { LAUNCHES, SYNCS, TO_HOST, TO_DEVICE, GRAPHS, CAPTURED, BYTES, PEAK_BYTES, COUNTS };
static double counts[COUNTS];
static int capturing;
static char *memory;  // addresses of the device: reserved, so that no other pointer lies among them
static size_t total, top;
static const size_t RESERVED = 1UL << 40, PAGE = 2UL << 20;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void start(void) {
    pthread_mutex_lock(&lock);
    if (!memory) {
        const char *gigabytes = getenv("NULLGPU_GB");
        total = (size_t)((gigabytes ? atof(gigabytes) : 79.0) * (1 << 30));
        memory = mmap(0, RESERVED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        top = PAGE;
    }
    pthread_mutex_unlock(&lock);
}

static int on_device(const void *p) { return memory && (char *)p >= memory && (char *)p < memory + RESERVED; }

static int launched(void) {
    counts[capturing ? CAPTURED : LAUNCHES]++;
    return 0;
}

static int waited(void) {
    counts[SYNCS]++;
    return capturing ? cudaErrorStreamCaptureUnsupported : 0;
}

// launches, synchronisations, copies to the host and to the device, graph launches, launches captured, bytes, their peak
API void nullgpu_counts(double *out) { memcpy(out, counts, sizeof counts); }

// ---------------------------------------------------------------------------------------------------- the device
static int attribute(int which) {
    switch (which) {  // cudaDeviceAttr and CUdevice_attribute agree
    case 1: case 2: case 3: return 1024;  // threads of a block, its sides x and y
    case 4: return 64;
    case 5: return 2147483647;  // blocks of a grid
    case 6: case 7: return 65535;
    case 8: return 48 << 10;  // shared memory of a block, bytes
    case 10: return 32;  // threads of a warp
    case 12: case 82: return 65536;  // registers
    case 13: return 1980000;  // kHz
    case 16: return 132;  // multiprocessors
    case 36: return 2619000;
    case 37: return 5120;
    case 38: return 50 << 20;  // L2 cache, bytes
    case 39: return 2048;  // threads of a multiprocessor
    case 75: return 9;  // compute capability 9.0
    case 76: return 0;
    case 81: return 228 << 10;  // shared memory of a multiprocessor; of a block, if asked for
    case 97: return 227 << 10;
    case 106: return 32;
    case 111: return 1024;
    default: return 1;
    }
}

API int cudaDeviceGetAttribute(int *value, int which) { *value = attribute(which); return 0; }
API int cuDeviceGetAttribute(int *value, int which) { *value = attribute(which); return 0; }
API int cudaGetDeviceProperties(struct cudaDeviceProp *p) {
    start();
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NullGPU (computes nothing)");
    p->major = 9, p->multiProcessorCount = attribute(16), p->totalGlobalMem = total, p->warpSize = 32;
    p->sharedMemPerBlock = attribute(8), p->sharedMemPerBlockOptin = attribute(97);
    p->sharedMemPerMultiprocessor = attribute(81), p->regsPerBlock = p->regsPerMultiprocessor = attribute(12);
    p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = attribute(5), p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = attribute(38), p->memoryBusWidth = 5120, p->textureAlignment = 512;
    p->unifiedAddressing = p->cooperativeLaunch = p->concurrentKernels = 1;
    return 0;
}
API int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
API int cuDeviceGetCount(int *n) { *n = 1; return 0; }
API int cudaGetDevice(int *device) { *device = 0; return 0; }
API int cuDeviceGet(int *device) { *device = 0; return 0; }
API int cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : 0; }
API int cudaDeviceCanAccessPeer(int *can) { *can = 0; return 0; }
API int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -5; return 0; }
API int cudaDeviceGetPCIBusId(char *id, int n) { snprintf(id, n, "0000:01:00.0"); return 0; }
API int cuDeviceGetUuid(char *uuid) { memset(uuid, 0, 16); return 0; }
API int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
API int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
API int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
API int cuInit() { start(); return 0; }
API int cuCtxGetCurrent(void **context) { *context = &capturing; return 0; }
API int cuDevicePrimaryCtxRetain(void **context) { *context = &capturing; return 0; }
API int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }
API int cuCtxGetLimit(size_t *value) { *value = 1 << 20; return 0; }
API const char *cudaGetErrorString() { return "error of the null GPU"; }
API const char *cudaGetErrorName() { return "error of the null GPU"; }
API int cuGetErrorString(int error, const char **text) { *text = "error of the null GPU"; return 0; }
API int cuGetErrorName(int error, const char **text) { *text = "error of the null GPU"; return 0; }
API int cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags, int *result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return 0;
}

// ------------------------------------------------------------------------------------------------------- memory
typedef struct { size_t bytes; } Block;  // in the page before the block's own

API int cudaMalloc(void **p, size_t bytes) {
    start();
    size_t pages = (bytes + PAGE - 1) / PAGE * PAGE;
    pthread_mutex_lock(&lock);
    int fits = counts[BYTES] + bytes <= total;
    if (fits) {
        ((Block *)(memory + top))->bytes = bytes;
        *p = memory + top + PAGE, top += pages + PAGE, counts[BYTES] += bytes;
        if (counts[BYTES] > counts[PEAK_BYTES]) counts[PEAK_BYTES] = counts[BYTES];
    }
    pthread_mutex_unlock(&lock);
    return fits ? 0 : cudaErrorMemoryAllocation;
}
API int cudaFree(void *p) {
    if (p && on_device(p)) {
        Block *block = (Block *)((char *)p - PAGE);
        counts[BYTES] -= block->bytes;
        madvise(p, block->bytes, MADV_DONTNEED);
    }
    return 0;
}
API int cudaMemGetInfo(size_t *free_bytes, size_t *all) {
    start();
    *all = total, *free_bytes = total - (size_t)counts[BYTES];
    return 0;
}
API int cudaHostAlloc(void **p, size_t bytes) { *p = aligned_alloc(4096, (bytes + 4095) & ~4095UL); return 0; }
API int cudaFreeHost(void *p) { free(p); return 0; }
API int cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    a->type = on_device(p) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered, a->devicePointer = (void *)p;
    return 0;
}
API int cuPointerGetAttribute(void *out, int which, char *p) {
    if (!on_device(p)) return cudaErrorInvalidValue;
    if (which == 3) *(void **)out = p;  // the device pointer
    else *(int *)out = 0;
    return 0;
}
static int copy(void *target, const void *source, size_t bytes) {
    start();
    if (on_device(target) && on_device(source)) return launched();
    if (on_device(source)) {  // what the device would have computed: zeros, but true for a single flag
        counts[TO_HOST]++;
        memset(target, 0, bytes);
        if (bytes == 1) *(char *)target = 1;
    } else if (on_device(target)) {
        counts[TO_DEVICE]++;
    } else {
        memcpy(target, source, bytes);
        return 0;
    }
    return capturing ? cudaErrorStreamCaptureUnsupported : 0;
}
API int cudaMemcpyAsync(void *target, const void *source, size_t bytes) { return copy(target, source, bytes); }
API int cudaMemcpy(void *target, const void *source, size_t bytes) { waited(); return copy(target, source, bytes); }
LAUNCH(cudaMemset)
LAUNCH(cudaMemsetAsync)
LAUNCH(cudaMemcpy2DAsync)

// --------------------------------------------------------------------------------------- streams, events, graphs
NEW(cudaStreamCreate)
NEW(cudaStreamCreateWithPriority)
NEW(cudaEventCreate)
NEW(cudaEventCreateWithFlags)
API int cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return 0; }
API int cudaDeviceSynchronize() { return waited(); }
API int cudaStreamSynchronize() { return waited(); }
API int cudaEventSynchronize() { return waited(); }
API int cudaEventElapsedTime(float *milliseconds) { *milliseconds = 1; return 0; }
API int cudaStreamIsCapturing(void *stream, int *status) { *status = capturing; return 0; }
API int cudaStreamGetCaptureInfo(
    void *stream, int *status, unsigned long long *id, void **graph, void **nodes, void **edges, size_t *n) {
    *status = capturing;
    if (id) *id = 1;
    if (graph) *graph = 0;
    if (nodes) *nodes = 0;
    if (edges) *edges = 0;
    if (n) *n = 0;
    return 0;
}
API int cudaStreamBeginCapture() { capturing = 1, counts[CAPTURED] = 0; return 0; }
API int cudaStreamEndCapture(void *stream, void **graph) {
    capturing = 0;
    *graph = calloc(1, sizeof(size_t));
    *(size_t *)*graph = counts[CAPTURED];
    return 0;
}
API int cudaGraphInstantiateWithFlags(void **executable, void *graph) { *executable = graph; return 0; }
API int cudaGraphGetNodes(size_t *graph, void *nodes, size_t *n) { *n = graph ? *graph : 0; return 0; }
API int cudaGraphLaunch() { counts[GRAPHS]++; return 0; }
API int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) { function(data); return 0; }

// ------------------------------------------------------------------------------------------------------ launches
typedef struct { dim3 grid, block; size_t shared; void *stream; } Configuration;
static __thread Configuration pushed[16];
static __thread int depth;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed[depth++ & 15] = (Configuration){grid, block, shared, stream};
    return 0;
}
API int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
    Configuration c = pushed[--depth & 15];
    *grid = c.grid, *block = c.block, *shared = c.shared, *stream = c.stream;
    return 0;
}
API void **__cudaRegisterFatBinary() { static void *handle; return &handle; }
API char __cudaInitModule() { return 1; }
API int __cudaGetKernel(const void **kernel, const void *function) { *kernel = function; return 0; }
LAUNCH(__cudaLaunchKernel)
LAUNCH(cudaLaunchKernel)
LAUNCH(cudaLaunchKernelExC)
LAUNCH(cuLaunchKernel)
LAUNCH(cuLaunchKernelEx)
LAUNCH(cuLaunchCooperativeKernel)
API int cudaFuncGetAttributes(struct cudaFuncAttributes *a) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->ptxVersion = a->binaryVersion = 90;
    a->maxDynamicSharedSizeBytes = attribute(8);
    return 0;
}
API int cuFuncGetAttribute(int *value, int which) { *value = which == 0 ? 1024 : which == 4 ? 64 : 0; return 0; }
API int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n) { *n = 2; return 0; }
API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n) { *n = 2; return 0; }
API int cuOccupancyMaxActiveClusters(int *n) { *n = 16; return 0; }
NEW(cuModuleLoadData)
NEW(cuModuleLoadDataEx)
NEW(cuModuleLoad)
NEW(cuModuleGetFunction)
API int cuMemGetAllocationGranularity(size_t *bytes) { *bytes = PAGE; return 0; }

// -------------------------------------------------------------------------------------------------------- cuBLAS
NEW(cublasCreate_v2)
API int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
API int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
LAUNCH(cublasSgemm_v2)
LAUNCH(cublasDgemm_v2)
LAUNCH(cublasGemmEx)
LAUNCH(cublasSgemmStridedBatched)
LAUNCH(cublasDgemmStridedBatched)
LAUNCH(cublasGemmStridedBatchedEx)
LAUNCH(cublasSgemv_v2)
LAUNCH(cublasSdot_v2)
LAUNCH(cublasLtMatmul)
NEW(cublasLtMatrixLayoutCreate)
NEW(cublasLtMatmulDescCreate)
NEW(cublasLtMatmulPreferenceCreate)
API size_t cublasLtGetVersion() { return 130100; }
API int cublasLtMatmulAlgoGetHeuristic(
    void *h, void *d, void *a, void *b, void *c, void *e, void *p, int asked, char *results, int *found) {
    memset(results, 0, 96);
    *found = 1;
    return 0;
}

// --------------------------------------------------------------------------------------------------------- cuDNN
NEW(cudnnCreate)
NEW(cudnnCreateConvolutionDescriptor)
NEW(cudnnCreateActivationDescriptor)
NEW(cudnnCreateDropoutDescriptor)
NEW(cudnnCreatePoolingDescriptor)
API size_t cudnnGetVersion() { return 91900; }
API size_t cudnnGetCudartVersion() { return 13000; }
API const char *cudnnGetErrorString() { return "error of the null GPU"; }
API void cudnnGetLastErrorString(char *text, size_t n) { if (n) *text = 0; }

typedef struct { int axes, size[8], stride[8]; } TensorDescriptor;
NEW(cudnnCreateTensorDescriptor)
NEW(cudnnCreateFilterDescriptor)
API int cudnnSetTensorNdDescriptor(TensorDescriptor *d, int type, int axes, const int *size, const int *stride) {
    d->axes = axes;
    memcpy(d->size, size, axes * sizeof(int));
    memcpy(d->stride, stride, axes * sizeof(int));
    return 0;
}
API int cudnnGetTensorNdDescriptor(TensorDescriptor *d, int asked, int *type, int *axes, int *size, int *stride) {
    *type = 0, *axes = d->axes;
    memcpy(size, d->size, d->axes * sizeof(int));
    memcpy(stride, d->stride, d->axes * sizeof(int));
    return 0;
}
#define NO_WORKSPACE(name, ...) API int name(__VA_ARGS__ __VA_OPT__(,) size_t *bytes) { *bytes = 0; return 0; }
#define P void *
NO_WORKSPACE(cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize, P a, int b, int c, P d, P e, P f, P g, P h)
NO_WORKSPACE(cudnnGetBatchNormalizationTrainingExReserveSpaceSize, P a, int b, int c, P d, P e)
NO_WORKSPACE(cudnnGetBatchNormalizationBackwardExWorkspaceSize, P a, int b, int c, P d, P e, P f, P g, P h, P i, P j)
LAUNCH(cudnnBatchNormalizationForwardTrainingEx)
LAUNCH(cudnnBatchNormalizationBackwardEx)
LAUNCH(cudnnBatchNormalizationForwardInference)

API int cudnnBackendCreateDescriptor(int type, void **d) { *d = calloc(1, 256); return 0; }
API int cudnnBackendGetAttribute(void *d, int which, int type, long asked, long *found, void *out) {
    int one = which == 202 || which == 300;  // the heuristic's result, its engine
    int workspace = which == 303 || which == 402;
    if (found) *found = one || workspace;
    if (out && workspace) *(long *)out = 1 << 20;
    return 0;
}
LAUNCH(cudnnBackendExecute)

API int cuMemCreate() { return cudaErrorNotSupported; }  // no expandable segments
API int cuMemAddressReserve() { return cudaErrorNotSupported; }
API int cuMemMap() { return cudaErrorNotSupported; }
