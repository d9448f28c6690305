// Gives the schemas that python/clara_fast/ops/_library.py defines their CPU kernels.
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"

STABLE_TORCH_LIBRARY_IMPL(clara_fast_native, CPU, m) {
  m.impl("pool_memory_forward", TORCH_BOX(&clara_fast::cpu::pool_memory_forward));
  m.impl("pool_memory_backward", TORCH_BOX(&clara_fast::cpu::pool_memory_backward));
  m.impl("cosine_topk", TORCH_BOX(&clara_fast::cpu::cosine_topk));
  m.impl("cosine_topk_parts", TORCH_BOX(&clara_fast::cpu::cosine_topk_parts));
  m.impl("select_memory_forward", TORCH_BOX(&clara_fast::cpu::select_memory_forward));
  m.impl("select_memory_backward", TORCH_BOX(&clara_fast::cpu::select_memory_backward));
  m.impl("few_rows_linear", TORCH_BOX(&clara_fast::cpu::few_rows_linear));
  m.impl("compressed_context_attention_forward",
         TORCH_BOX(&clara_fast::cpu::compressed_context_attention_forward));
  m.impl("compressed_context_attention_backward",
         TORCH_BOX(&clara_fast::cpu::compressed_context_attention_backward));
}
