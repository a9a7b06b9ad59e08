// "seconddev": a device for tests whose memory is the host's and whose kernels are PyTorch's own for the CPU.
//
// What makes it a second device is that it keeps its tensors apart: an operator that meets one of them and one of the
// CPU's is refused where CUDA refuses it. Every launch of a kernel, and every moment at which the host of a real GPU
// would have to wait for it, is told to a listener; the bytes that tensors hold are counted.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_set>

namespace {

using at::Tensor;

constexpr auto kType = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kType, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

// ------------------------------------------------------------------------------------------------ what is counted

using Listener = void (*)(const char* kind, const char* op);

std::atomic<Listener> listener{nullptr};
std::atomic<int64_t> bytes_now{0}, bytes_peak{0};

void tell(const char* kind, const std::string& op) {
  if (Listener heard = listener) heard(kind, op.c_str());
}

// ------------------------------------------------------------------------------------------------ memory

struct DeviceMemory final : at::Allocator {
  struct Block {
    void* data;
    int64_t bytes;
  };

  at::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, kDevice};
    auto* block = new Block{std::aligned_alloc(64, (bytes + 63) / 64 * 64), static_cast<int64_t>(bytes)};
    TORCH_CHECK(block->data != nullptr, "seconddev: no memory for ", bytes, " bytes");
    std::memset(block->data, 0xFF, bytes);  // NaN: what is read before it is written shows
    const int64_t now = bytes_now += block->bytes;
    for (int64_t peak = bytes_peak; now > peak && !bytes_peak.compare_exchange_weak(peak, now);) {
    }
    return {block->data, block, &give_back, kDevice};
  }

  static void give_back(void* context) {
    auto* block = static_cast<Block*>(context);
    bytes_now -= block->bytes;
    std::free(block->data);
    delete block;
  }

  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
};

// Pinned memory of the host: only from there does a copy to the device not hold the host up.
struct PinnedMemory final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    auto* data = static_cast<char*>(std::malloc(bytes + 1));
    std::lock_guard<std::mutex> lock(mutex());
    blocks()[data] = bytes;
    return {data, data, &give_back, at::kCPU};
  }

  static void give_back(void* data) {
    std::lock_guard<std::mutex> lock(mutex());
    blocks().erase(static_cast<char*>(data));
    std::free(data);
  }

  static bool holds(const void* data) {
    std::lock_guard<std::mutex> lock(mutex());
    auto next = blocks().upper_bound(static_cast<const char*>(data));
    if (next == blocks().begin()) return false;
    const auto& [begin, bytes] = *std::prev(next);
    return data < begin + bytes;
  }

  // Never destroyed: tensors may outlive everything else at the end of the process.
  static std::map<const char*, size_t>& blocks() {
    static auto* blocks = new std::map<const char*, size_t>();
    return *blocks;
  }
  static std::mutex& mutex() {
    static auto* mutex = new std::mutex();
    return *mutex;
  }

  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
};

DeviceMemory device_memory;
PinnedMemory pinned_memory;
REGISTER_ALLOCATOR(kType, &device_memory);

// ------------------------------------------------------------------------------------------------ the one device

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kType> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return only_stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return only_stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return only_stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only_stream(); }
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  static c10::Stream only_stream() noexcept { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  Hooks() { at::RegisterPrivateUse1HooksInterface(this); }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::holds(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
};
auto* hooks = new Hooks();

// ------------------------------------------------------------------------------------------------ any operator

Tensor over(c10::Storage storage, c10::DispatchKeySet keys, const Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

// The same memory as a tensor of the CPU, for as long as ``t`` lives; a kernel that makes it larger gives it its own.
Tensor on_host(const Tensor& t) {
  if (t.is_cpu()) return t;
  TORCH_CHECK(t.device() == kDevice, "a tensor on ", t.device(), " met one on ", kDevice);
  TORCH_CHECK(!t.is_conj() && !t.is_neg(), "seconddev knows no conjugated or negated views");
  at::DataPtr data(t.storage().mutable_data(), at::kCPU);
  const size_t bytes = t.storage().nbytes();
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), c10::GetCPUAllocator(), true);
  return over(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), t);
}

Tensor new_on_device(const Tensor& host) {
  const size_t bytes = host.storage().nbytes();
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, device_memory.allocate(bytes), &device_memory, true);
  if (bytes > 0) std::memcpy(storage.mutable_data(), host.storage().data(), bytes);
  return over(std::move(storage), kKeys, host);
}

const Tensor& resize_in_place(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt);
  if (format.has_value()) self.unsafeGetTensorImpl()->empty_tensor_restride(*format);
  return self;
}

// Replaces every tensor that a value holds, alone or in a list.
template <typename Replace>
void each_tensor(c10::IValue& value, Replace replace) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) value = replace(value.toTensor());
  } else if (value.isTensorList() || value.isOptionalTensorList()) {
    auto list = value.toList().copy();
    for (size_t i = 0; i < list.size(); ++i) {
      c10::IValue item = list.get(i);
      if (item.isTensor() && item.toTensor().defined()) list.set(i, replace(item.toTensor()));
    }
    value = std::move(list);
  }
}

using Names = const std::unordered_set<std::string>;

// Operators without the tag `pointwise` that CUDA gives a 0-dim tensor of the CPU to as a plain number.
Names kTakesNumbers{"aten::fill_",         "aten::masked_fill_", "aten::_foreach_mul",  "aten::_foreach_mul_",
                    "aten::_foreach_div",  "aten::_foreach_div_", "aten::_foreach_add", "aten::_foreach_add_"};
Names kIndexing{"aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_",
                "aten::_unsafe_index_put", "aten::_index_put_impl_"};
Names kProducts{"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmv", "aten::dot", "aten::vdot"};

// Refuses what CUDA refuses of one argument, and tells of what the host waits for.
void judge(const c10::OperatorHandle& op, const c10::Argument& argument, const Tensor& tensor, bool into_host) {
  const std::string& name = op.schema().name();
  const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
  if (kIndexing.count(name) != 0) {
    if (argument.name() == "indices") {
      TORCH_CHECK(!into_host || tensor.is_cpu(), "indices should be on the device of the indexed tensor (cpu)");
      if (tensor.is_cpu() && !into_host) tell("upload", name + " by a host's tensor");
      if (tensor.scalar_type() == at::kBool) tell("read", name + " by a mask");
      return;
    }
    if (argument.name() == "self" && tensor.is_cpu()) return;  // its indices and values decide
    if (argument.name() == "values" && tensor.dim() == 0 && tensor.is_cpu() != into_host) {
      tell(into_host ? "read" : "upload", name + " of one value");
      return;
    }
    TORCH_CHECK(!into_host, "Expected all tensors to be on the same device: ", argument.name(), " of ", name);
  }
  const bool takes_numbers = op.hasTag(at::Tag::pointwise) || kTakesNumbers.count(name) != 0;
  TORCH_CHECK(!tensor.is_cpu() || (takes_numbers && tensor.dim() == 0 && !written),
              "Expected all tensors to be on the same device, but found at least two devices, ", kDevice,
              " and cpu! (", argument.name(), " of ", name, ")");
  TORCH_CHECK(kProducts.count(name) == 0 || !at::isIntegralType(tensor.scalar_type(), true), "\"", name,
              "\" is not implemented for integers on a GPU");
}

// Runs the CPU's kernel on the device's memory. What it writes to is the device's own; what it makes is moved there.
void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto& schema = op.schema();
  const size_t begin = stack->size() - schema.arguments().size();
  const auto& first = (*stack)[begin];
  const bool into_host = first.isTensor() && first.toTensor().defined() && first.toTensor().is_cpu();
  std::vector<std::pair<Tensor, Tensor>> given;  // each argument, and the kernel's view of it
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    each_tensor((*stack)[begin + i], [&](const Tensor& tensor) {
      judge(op, schema.arguments()[i], tensor, into_host);
      given.emplace_back(tensor, on_host(tensor));
      return given.back().second;
    });
  }
  const bool by_mask_only = kIndexing.count(schema.name()) != 0;
  if (op.hasTag(at::Tag::data_dependent_output) || (op.hasTag(at::Tag::dynamic_output_shape) && !by_mask_only)) {
    tell("read", schema.name());
  }
  const auto& returns = schema.returns();
  const bool is_view = !returns.empty() && returns[0].alias_info() != nullptr && !returns[0].alias_info()->isWrite();
  if (!is_view) tell("launch", schema.name());

  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  for (const auto& [tensor, host] : given) {
    if (host.sizes() != tensor.sizes()) on_host(resize_in_place(tensor, host.sizes(), std::nullopt)).copy_(host);
  }
  for (size_t i = stack->size() - returns.size(); i < stack->size(); ++i) {
    each_tensor((*stack)[i], [&](const Tensor& made) {
      for (const auto& [tensor, host] : given) {
        if (made.is_same(host)) return tensor;
        if (is_view && made.storage().is_alias_of(host.storage())) {
          auto view = at::detail::make_tensor<c10::TensorImpl>(
              c10::TensorImpl::VIEW, c10::Storage(tensor.storage()), tensor.key_set(), made.dtype());
          view.unsafeGetTensorImpl()->set_sizes_and_strides(made.sizes(), made.strides(), made.storage_offset());
          return view;
        }
      }
      return new_on_device(made);
    });
  }
}

// ------------------------------------------------------------------------------------------------ its own operators

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &device_memory, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &device_memory, kKeys, c10::dtype_or_default(dtype));
}

// Between host and device the host waits, unless its side is pinned and it does not want to.
Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  const Tensor& host = from.is_cpu() ? from : to;
  const bool asynchronous = !host.is_cpu() || (non_blocking && PinnedMemory::holds(host.const_data_ptr()));
  tell(asynchronous ? "launch" : from.is_cpu() ? "upload" : "read", "aten::copy_");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  on_host(to).copy_(on_host(from));
  return to;
}

at::Scalar item(const Tensor& self) {
  tell("read", "aten::item");
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return at::_local_scalar_dense(on_host(self));
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  TORCH_CHECK(source.device() == kDevice, "a tensor on ", kDevice, " cannot have a storage on ", source.device());
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_local_scalar_dense", &item);
  m.impl("resize_", &resize_in_place);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  // What PyTorch would take apart for a device it does not know, and is one kernel on CUDA.
  for (const char* name : {"convolution", "convolution_backward", "native_group_norm", "native_group_norm_backward",
                           "native_layer_norm", "native_layer_norm_backward", "silu_backward", "index.Tensor"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
  }
  for (const auto& op : c10::Dispatcher::singleton().getAllOpNames()) {
    if (op.name.rfind("aten::_foreach_", 0) == 0) {
      const std::string name = op.name + (op.overload_name.empty() ? "" : "." + op.overload_name);
      m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run>());
    }
  }
}

// Autocast: PyTorch's lists, which are those of CUDA.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

namespace at::autocast {
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define TO_LOW_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
  AT_FORALL_LOWER_PRECISION_FP(TO_LOW_PRECISION)
#define TO_FLOAT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_FP32(TO_FLOAT)
#define TO_FLOAT_BY_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
  AT_FORALL_FP32_SET_OPT_DTYPE(TO_FLOAT_BY_DTYPE)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
#define TO_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_PROMOTE(TO_WIDEST)
}
}  // namespace at::autocast

// ------------------------------------------------------------------------------------------------ for Python's ctypes

extern "C" {
// Lets an operator that is composed of others, as those of a library are, count as the one kernel it has on a GPU.
void seconddev_take_as_one_kernel(const char* space, const char* name) {
  static auto* kept = new std::vector<torch::Library>();
  kept->emplace_back(torch::Library::IMPL, space, c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  kept->back().impl(name, torch::CppFunction::makeFromBoxedFunction<&run>());
}
void seconddev_listen(Listener heard) { listener = heard; }
int64_t seconddev_bytes_now() { return bytes_now; }
int64_t seconddev_bytes_peak() { return bytes_peak; }
void seconddev_forget_peak() { bytes_peak = bytes_now.load(); }
}
