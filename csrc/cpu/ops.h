// The CPU ops. Their meaning is in python/clara_fast/ops/reference.py; Python has checked the arguments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace clara_fast::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> pool_memory_forward(Tensor hidden, Tensor offsets, int64_t num_memory,
                                                       std::optional<Tensor> norm_weight, double norm_eps);

std::tuple<Tensor, Tensor> pool_memory_backward(Tensor grad_memory, Tensor grad_mse, Tensor difference,
                                                Tensor hidden, Tensor offsets, int64_t num_memory,
                                                std::optional<Tensor> norm_weight, double norm_eps);

std::tuple<Tensor, Tensor> cosine_topk(Tensor queries, Tensor keys, int64_t k,
                                       std::optional<Tensor> key_scales);

// Over the keys of several tensors as if they were one. key_scales and allowed (bool [N], which keys may be
// found; empty for all) are one tensor for each of `keys`, or none. Where `release`, the pages under keys
// and scales are let go as soon as all of a tensor are compared: they must be mapped from a file.
std::tuple<Tensor, Tensor> cosine_topk_parts(Tensor queries, std::vector<Tensor> keys, int64_t k,
                                             std::vector<Tensor> key_scales, std::vector<Tensor> allowed,
                                             bool release);

std::tuple<Tensor, Tensor, Tensor> select_memory_forward(Tensor query, Tensor keys, Tensor memory, int64_t k,
                                                         double temperature, std::optional<Tensor> valid);

std::tuple<Tensor, Tensor, Tensor> select_memory_backward(Tensor grad_selected, Tensor grad_scores,
                                                          Tensor query, Tensor keys, Tensor memory,
                                                          Tensor indices, Tensor scores, double temperature,
                                                          double taken_logit, std::optional<Tensor> valid);

// x [T, in] @ weight [out, in].T + bias, and with down [r, in], up [out, r]: + scaling * (x @ down.T) @ up.T;
// T is at most kStreamRows.
Tensor few_rows_linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> down,
                       std::optional<Tensor> up, double scaling);

// Both write into their last arguments.
Tensor compressed_context_attention_forward(Tensor query, Tensor key, Tensor value, Tensor q_start,
                                            Tensor q_len, Tensor kv_start, Tensor kv_len, Tensor contexts,
                                            double scale, std::optional<Tensor> lse);

void compressed_context_attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor query,
                                           Tensor key, Tensor value, Tensor out, Tensor lse, Tensor q_start,
                                           Tensor q_len, Tensor kv_start, Tensor kv_len, Tensor contexts,
                                           double scale, Tensor grad_query, Tensor grad_key,
                                           Tensor grad_value);

}  // namespace clara_fast::cpu
