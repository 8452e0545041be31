// ai.tocom::TokenMerge for OpenVINO: the adapter of token_merge.h, loaded with Core.add_extension.
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>
#include <openvino/op/op.hpp>
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include "token_merge.h"

namespace tocom {

// Decisions of the operator's calls, while somebody asks for them: making them outputs of a model would change the
// precision that OpenVINO computes in around them, so that another model would be checked than the one that runs.
struct Recorder {
    std::atomic<bool> on{false};
    std::mutex lock;
    std::vector<std::vector<std::int64_t>> calls;

    static Recorder& instance() {
        static Recorder recorder;
        return recorder;
    }

    void add(const ov::TensorVector& outputs) {
        std::vector<std::int64_t> call;
        for (std::size_t output = 2; output < 5; ++output) {
            const auto* data = static_cast<const std::int64_t*>(outputs[output].data());
            call.insert(call.end(), data, data + outputs[output].get_size());
        }
        const std::lock_guard<std::mutex> guard(lock);
        calls.push_back(std::move(call));
    }
};

// x [B, N, C], token_size [B, N, 1], metric [B, N, D] -> merged, merged_size, src, dst, unm; x and metric in float32 or
// bfloat16, token_size in float32. In place of the metric it also takes the keys that it is the mean of, [B, N, H, D].
class TokenMerge : public ov::op::Op {
  public:
    OPENVINO_OP("TokenMerge", "ai.tocom");

    TokenMerge() = default;

    TokenMerge(const ov::OutputVector& inputs, std::int64_t r, std::int64_t prefix, std::int64_t keep_order)
        : Op(inputs), r_(r), protected_(prefix), keep_order_(keep_order) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        const auto& x = get_input_partial_shape(0);
        const auto& metric = get_input_partial_shape(2);
        NODE_VALIDATION_CHECK(this, get_input_size() == 3, "takes x, token_size and metric");
        NODE_VALIDATION_CHECK(this, x.rank() == 3 && x[1].is_static() && x[2].is_static(),
                              "x must be [batch, tokens, channels] with static tokens and channels, got ", x);
        NODE_VALIDATION_CHECK(this, metric.rank() == 3 || (metric.rank() == 4 && metric[2].is_static()),
                              "metric must be [batch, tokens, D] or [batch, tokens, heads, D], got ", metric);
        const std::size_t rank = metric.size();
        NODE_VALIDATION_CHECK(this, metric[1] == x[1] && metric[rank - 1].is_static(),
                              "metric must have as many tokens as x, got ", metric, " for ", x);
        NODE_VALIDATION_CHECK(this, is_real(0) && is_real(2) && get_input_element_type(1) == ov::element::f32,
                              "takes x and metric in f32 or bf16, token_size in f32");
        NODE_VALIDATION_CHECK(this, r_ >= 0 && protected_ >= 0, "r and protected must be 0 or more");
        const MergeShape shape = shape_of(x[1].get_length(), x[2].get_length(), metric[rank - 1].get_length(),
                                          rank == 4 ? metric[2].get_length() : 1);
        NODE_VALIDATION_CHECK(this, shape.valid(), "cannot merge ", r_, " of ", shape.tokens, " tokens");
        const ov::Dimension batch = x[0];
        const auto extent = [](std::size_t count) { return ov::Dimension(static_cast<std::int64_t>(count)); };
        set_output_type(0, get_input_element_type(0), {batch, extent(shape.remaining()), x[2]});
        set_output_type(1, ov::element::f32, {batch, extent(shape.remaining()), 1});
        set_output_type(2, ov::element::i64, {batch, extent(shape.removed)});
        set_output_type(3, ov::element::i64, {batch, extent(shape.removed)});
        set_output_type(4, ov::element::i64, {batch, extent(shape.unmerged())});
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<TokenMerge>(inputs, r_, protected_, keep_order_);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("r", r_);
        visitor.on_attribute("protected", protected_);
        visitor.on_attribute("keep_order", keep_order_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const bool half = inputs[0].get_element_type() == ov::element::bf16;
        const bool half_metric = inputs[2].get_element_type() == ov::element::bf16;
        if (half) {
            half_metric ? run<bf16, bf16>(outputs, inputs) : run<bf16, float>(outputs, inputs);
        } else {
            half_metric ? run<float, bf16>(outputs, inputs) : run<float, float>(outputs, inputs);
        }
        if (Recorder::instance().on) {
            Recorder::instance().add(outputs);
        }
        return true;
    }

  private:
    bool is_real(std::size_t input) const {
        const auto& type = get_input_element_type(input);
        return type == ov::element::f32 || type == ov::element::bf16;
    }

    MergeShape shape_of(std::size_t tokens, std::size_t channels, std::size_t metric, std::size_t heads) const {
        return {tokens, channels, metric, heads, static_cast<std::size_t>(r_), static_cast<std::size_t>(protected_),
                keep_order_ != 0};
    }

    template <class T, class M> void run(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
        const auto& dims = inputs[0].get_shape();
        const auto& keys = inputs[2].get_shape();
        const MergeShape shape = shape_of(dims[1], dims[2], keys.back(), keys.size() == 4 ? keys[2] : 1);
        const std::size_t images = dims[0], tokens = shape.tokens, left = shape.remaining();
        const auto* x = static_cast<const T*>(inputs[0].data());
        const auto* size = static_cast<const float*>(inputs[1].data());
        const auto* metric = static_cast<const M*>(inputs[2].data());
        auto* merged = static_cast<T*>(outputs[0].data());
        auto* merged_size = static_cast<float*>(outputs[1].data());
        const auto decided = [&](std::size_t image) -> Decisions {
            return {static_cast<std::int64_t*>(outputs[2].data()) + image * shape.removed,
                    static_cast<std::int64_t*>(outputs[3].data()) + image * shape.removed,
                    static_cast<std::int64_t*>(outputs[4].data()) + image * shape.unmerged()};
        };
        const auto merge_part = [&](std::size_t image, std::size_t part, std::size_t parts) {
            thread_merger().merge(shape, x + image * tokens * shape.channels, size + image * tokens, decided(image),
                                  left * part / parts, left * (part + 1) / parts,
                                  merged + image * left * shape.channels, merged_size + image * left);
        };
        const auto match_image = [&](std::size_t image) {
            thread_merger().match(shape, metric + image * shape.heads * tokens * shape.metric, decided(image));
        };
        const auto threads = static_cast<std::size_t>(tbb::this_task_arena::max_concurrency());
        if (images == 1 && threads > 1) {
            match_image(0);
            tbb::parallel_for(std::size_t{0}, threads, [&](std::size_t part) { merge_part(0, part, threads); });
            return;
        }
        tbb::parallel_for(std::size_t{0}, images, [&](std::size_t image) {
            match_image(image);
            merge_part(image, 0, 1);
        });
    }

    static Merger& thread_merger() {
        static thread_local Merger merger;
        return merger;
    }

    std::int64_t r_ = 0, protected_ = 1, keep_order_ = 1;
};

} // namespace tocom

// Begins to record decisions, forgetting earlier ones, or ends it.
extern "C" void tocom_record(int on) {
    auto& recorder = tocom::Recorder::instance();
    const std::lock_guard<std::mutex> guard(recorder.lock);
    recorder.on = on != 0;
    recorder.calls.clear();
}

// Call number `call` since then: src [B, r], dst [B, r] and unm [B, A - r] one behind the other; null behind the last.
extern "C" const std::int64_t* tocom_recorded(std::size_t call, std::size_t* count) {
    auto& recorder = tocom::Recorder::instance();
    const std::lock_guard<std::mutex> guard(recorder.lock);
    if (call >= recorder.calls.size()) {
        return nullptr;
    }
    *count = recorder.calls[call].size();
    return recorder.calls[call].data();
}

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    std::make_shared<ov::OpExtension<tocom::TokenMerge>>(),
    std::make_shared<ov::frontend::onnx::OpExtension<tocom::TokenMerge>>("TokenMerge", "ai.tocom"),
}));
