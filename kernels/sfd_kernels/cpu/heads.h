// (B, N, H, d) tensors read where they lie: slices of packed qkv, or heads before tokens in memory.
#pragma once

#include "kernel.h"

namespace sfd {

struct HeadRows {  // strides in elements; the last dimension's is 1
  const void* data;
  i64 batch, token, head;
};

#ifndef SFD_ISA
// A copy takes the place of a tensor whose rows do not lie together; the tensor must outlive what is returned.
inline HeadRows head_rows(Tensor& t) {
  if (t.size(3) > 1 && t.stride(3) != 1) t = torch::stable::contiguous(t);
  return {pointer(t), t.stride(0), t.stride(1), t.stride(2)};
}
#endif

}  // namespace sfd
