// This project's operators for OpenVINO: the adapters of token_merge.h and rows.h, loaded as an extension.
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>
#include <openvino/op/op.hpp>
#include <tbb/blocked_range.h>
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

inline bool is_real(const ov::element::Type& type) { return type == ov::element::f32 || type == ov::element::bf16; }

// Whether an input is [channels] in float32.
inline bool is_parameter(const ov::Node& node, std::size_t input, const ov::Dimension& channels) {
    return node.get_input_element_type(input) == ov::element::f32 &&
           node.get_input_partial_shape(input).compatible(ov::PartialShape{channels});
}

template <class T> const T* data(const ov::Tensor& tensor) { return static_cast<const T*>(tensor.data()); }

template <class T> T* data(ov::Tensor& tensor) { return static_cast<T*>(tensor.data()); }

// x [B, N, C], token_size [B, N, 1], metric [B, N, D] -> merged, merged_size, src, dst, unm; x and metric in float32 or
// bfloat16, token_size in float32. In place of the metric it also takes the keys that it is the mean of, [B, N, H, D].
//
// With three further inputs it does what stands around a merge in a block, in the same pass: addend [B, N, C], added to x
// before, in x's type, and weight and bias [C] of the layer norm behind, in float32. Two outputs follow then: the layer
// norm of merged, and the logarithm of merged_size as [B, 1, 1, N - r], both in x's type.
class TokenMerge : public ov::op::Op {
  public:
    OPENVINO_OP("TokenMerge", "ai.tocom");

    TokenMerge() = default;

    TokenMerge(const ov::OutputVector& inputs, std::int64_t r, std::int64_t tokens, std::int64_t prefix,
               std::int64_t keep_order, float epsilon)
        : Op(inputs), r_(r), tokens_(tokens), protected_(prefix), keep_order_(keep_order), epsilon_(epsilon) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        const auto& x = get_input_partial_shape(0);
        const auto& metric = get_input_partial_shape(2);
        const auto& type = get_input_element_type(0);
        NODE_VALIDATION_CHECK(this, get_input_size() == 3 || fused(), "takes x, token_size and metric");
        NODE_VALIDATION_CHECK(this, x.rank() == 3 && x[1] == tokens_ && x[2].is_static(),
                              "x must be [batch, ", tokens_, ", channels] with static channels, got ", x);
        NODE_VALIDATION_CHECK(this, metric.rank() == 3 || (metric.rank() == 4 && metric[2].is_static()),
                              "metric must be [batch, tokens, D] or [batch, tokens, heads, D], got ", metric);
        const std::size_t rank = metric.size();
        NODE_VALIDATION_CHECK(this, metric[1] == x[1] && metric[rank - 1].is_static(),
                              "metric must have as many tokens as x, got ", metric, " for ", x);
        NODE_VALIDATION_CHECK(this, is_real(type) && is_real(get_input_element_type(2)) &&
                                        get_input_element_type(1) == ov::element::f32,
                              "takes x and metric in f32 or bf16, token_size in f32");
        NODE_VALIDATION_CHECK(this, !fused() || (get_input_element_type(3) == type &&
                                                 get_input_partial_shape(3).compatible(x) &&
                                                 is_parameter(*this, 4, x[2]) && is_parameter(*this, 5, x[2])),
                              "addend must be like x, weight and bias one f32 number per channel");
        NODE_VALIDATION_CHECK(this, r_ >= 0 && protected_ >= 0, "r and protected must be 0 or more");
        const MergeShape shape = shape_of(x[1].get_length(), x[2].get_length(), metric[rank - 1].get_length(),
                                          rank == 4 ? metric[2].get_length() : 1);
        NODE_VALIDATION_CHECK(this, shape.valid(), "cannot merge ", r_, " of ", shape.tokens, " tokens");
        const ov::Dimension batch = x[0];
        const auto extent = [](std::size_t count) { return ov::Dimension(static_cast<std::int64_t>(count)); };
        set_output_type(0, type, {batch, extent(shape.remaining()), x[2]});
        set_output_type(1, ov::element::f32, {batch, extent(shape.remaining()), 1});
        set_output_type(2, ov::element::i64, {batch, extent(shape.removed), 1});
        set_output_type(3, ov::element::i64, {batch, extent(shape.removed), 1});
        set_output_type(4, ov::element::i64, {batch, extent(shape.unmerged()), 1});
        if (fused()) {
            set_output_type(5, type, get_output_partial_shape(0));
            set_output_type(6, type, {batch, 1, 1, extent(shape.remaining())});
        }
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<TokenMerge>(inputs, r_, tokens_, protected_, keep_order_, epsilon_);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("r", r_);
        visitor.on_attribute("tokens", tokens_);
        visitor.on_attribute("protected", protected_);
        visitor.on_attribute("keep_order", keep_order_);
        visitor.on_attribute("epsilon", epsilon_);
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
    bool fused() const { return get_input_size() == 6; }

    MergeShape shape_of(std::size_t tokens, std::size_t channels, std::size_t metric, std::size_t heads) const {
        return {tokens, channels, metric, heads, static_cast<std::size_t>(r_), static_cast<std::size_t>(protected_),
                keep_order_ != 0};
    }

    template <class T, class M> void run(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
        const auto& dims = inputs[0].get_shape();
        const auto& keys = inputs[2].get_shape();
        const MergeShape shape = shape_of(dims[1], dims[2], keys.back(), keys.size() == 4 ? keys[2] : 1);
        const std::size_t images = dims[0], tokens = shape.tokens, left = shape.remaining();
        const std::size_t area = tokens * shape.channels, area_left = left * shape.channels;
        const LayerNorm norm{fused() ? data<float>(inputs[4]) : nullptr, fused() ? data<float>(inputs[5]) : nullptr,
                             epsilon_};
        const auto entering = [&](std::size_t image) -> Tokens<T> {
            return {data<T>(inputs[0]) + image * area, fused() ? data<T>(inputs[3]) + image * area : nullptr,
                    data<float>(inputs[1]) + image * tokens};
        };
        const auto remaining = [&](std::size_t image) -> Merged<T> {
            return {data<T>(outputs[0]) + image * area_left, data<float>(outputs[1]) + image * left,
                    fused() ? data<T>(outputs[5]) + image * area_left : nullptr,
                    fused() ? data<T>(outputs[6]) + image * left : nullptr};
        };
        const auto decided = [&](std::size_t image) -> Decisions {
            return {data<std::int64_t>(outputs[2]) + image * shape.removed,
                    data<std::int64_t>(outputs[3]) + image * shape.removed,
                    data<std::int64_t>(outputs[4]) + image * shape.unmerged()};
        };
        const auto merge_part = [&](std::size_t image, std::size_t part, std::size_t parts) {
            thread_merger().merge(shape, entering(image), norm, decided(image), left * part / parts,
                                  left * (part + 1) / parts, remaining(image));
        };
        const auto match_image = [&](std::size_t image) {
            thread_merger().match(shape, data<M>(inputs[2]) + image * shape.heads * tokens * shape.metric,
                                  decided(image));
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

    std::int64_t r_ = 0, tokens_ = 0, protected_ = 1, keep_order_ = 1;
    float epsilon_ = 0.0f;
};

// x [B, N, C], addend [B, N, C] in x's type, weight [C], bias [C] in float32 -> of the first `tokens` tokens the sum
// [B, tokens, C] and its layer norm, in x's type: what would be several passes over the tokens, in one.
class AddLayerNorm : public ov::op::Op {
  public:
    OPENVINO_OP("AddLayerNorm", "ai.tocom");

    AddLayerNorm() = default;

    AddLayerNorm(const ov::OutputVector& inputs, std::int64_t tokens, float epsilon)
        : Op(inputs), tokens_(tokens), epsilon_(epsilon) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        const auto& x = get_input_partial_shape(0);
        const auto& type = get_input_element_type(0);
        NODE_VALIDATION_CHECK(this, get_input_size() == 4 && is_real(type) && get_input_element_type(1) == type,
                              "takes x, an addend like it, weight and bias");
        NODE_VALIDATION_CHECK(this, x.rank() == 3 && x[1].is_static() && x[2].is_static() && tokens_ > 0 &&
                                        tokens_ <= x[1].get_length() && get_input_partial_shape(1).compatible(x),
                              "x must be [batch, tokens, channels] with at least ", tokens_, " tokens, got ", x);
        NODE_VALIDATION_CHECK(this, is_parameter(*this, 2, x[2]) && is_parameter(*this, 3, x[2]),
                              "weight and bias must be one f32 number per channel");
        for (std::size_t output = 0; output < 2; ++output) {
            set_output_type(output, type, {x[0], ov::Dimension(tokens_), x[2]});
        }
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<AddLayerNorm>(inputs, tokens_, epsilon_);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("tokens", tokens_);
        visitor.on_attribute("epsilon", epsilon_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        inputs[0].get_element_type() == ov::element::bf16 ? run<bf16>(outputs, inputs) : run<float>(outputs, inputs);
        return true;
    }

  private:
    template <class T> void run(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
        const auto& dims = inputs[0].get_shape();
        const std::size_t width = dims[2], left = static_cast<std::size_t>(tokens_), skipped = dims[1] - left;
        const LayerNorm norm{data<float>(inputs[2]), data<float>(inputs[3]), epsilon_};
        const T *x = data<T>(inputs[0]), *addend = data<T>(inputs[1]);
        T *sum = data<T>(outputs[0]), *normed = data<T>(outputs[1]);
        const auto normalize = [&](const tbb::blocked_range<std::size_t>& range) {
            static thread_local std::vector<float> row;
            row.resize(width);
            for (std::size_t token = range.begin(); token < range.end(); ++token) {
                const std::size_t to = token * width, from = to + token / left * skipped * width;
                read_row(x + from, addend + from, width, row.data());
                write_row(row.data(), width, sum + to);
                norm.apply(row.data(), width, normed + to);
            }
        };
        tbb::parallel_for(tbb::blocked_range<std::size_t>(0, dims[0] * left, kGrain), normalize);
    }

    static constexpr std::size_t kGrain = 32; // tokens that are worth a task

    std::int64_t tokens_ = 1;
    float epsilon_ = 0.0f;
};

// pixels [B, 3, H, W] in float32 -> patches of height x width pixels, row by row, [B, count, 3 * height * width] in
// float32, or if half in bfloat16; within a patch the pixels lie as the weights of a convolution do.
class CutPatches : public ov::op::Op {
  public:
    OPENVINO_OP("CutPatches", "ai.tocom");

    CutPatches() = default;

    CutPatches(const ov::OutputVector& inputs, std::int64_t height, std::int64_t width, std::int64_t half)
        : Op(inputs), height_(height), width_(width), half_(half) {
        constructor_validate_and_infer_types();
    }

    void validate_and_infer_types() override {
        const auto& pixels = get_input_partial_shape(0);
        NODE_VALIDATION_CHECK(this, get_input_size() == 1 && get_input_element_type(0) == ov::element::f32,
                              "takes pixels in f32");
        NODE_VALIDATION_CHECK(this, height_ > 0 && width_ > 0, "patches must have a size");
        NODE_VALIDATION_CHECK(this, pixels.rank() == 4 && pixels[1].is_static() && pixels[2].is_static() &&
                                        pixels[3].is_static() && pixels[2].get_length() % height_ == 0 &&
                                        pixels[3].get_length() % width_ == 0,
                              "pixels must be [batch, channels, H, W] of whole patches, got ", pixels);
        const auto count = pixels[2].get_length() / height_ * (pixels[3].get_length() / width_);
        set_output_type(0, half_ != 0 ? ov::element::bf16 : ov::element::f32,
                        {pixels[0], count, pixels[1].get_length() * height_ * width_});
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<CutPatches>(inputs, height_, width_, half_);
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("height", height_);
        visitor.on_attribute("width", width_);
        visitor.on_attribute("half", half_);
        return true;
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        half_ != 0 ? run<bf16>(outputs, inputs) : run<float>(outputs, inputs);
        return true;
    }

  private:
    template <class T> void run(ov::TensorVector& outputs, const ov::TensorVector& inputs) const {
        const auto& dims = inputs[0].get_shape();
        const std::size_t height = static_cast<std::size_t>(height_), width = static_cast<std::size_t>(width_);
        const std::size_t rows = dims[2] / height, columns = dims[3] / width, patch = dims[1] * height * width;
        const auto cut = [&](const tbb::blocked_range<std::size_t>& range) {
            for (std::size_t at = range.begin(); at < range.end(); ++at) { // a row of patches
                const std::size_t image = at / rows, row = at % rows;
                T* out = data<T>(outputs[0]) + at * columns * patch;
                for (std::size_t line = 0; line < dims[1] * height; ++line) { // of pixels, channel by channel
                    const std::size_t channel = line / height, y = row * height + line % height;
                    const float* pixels = data<float>(inputs[0]) + ((image * dims[1] + channel) * dims[2] + y) * dims[3];
                    for (std::size_t column = 0; column < columns; ++column) {
                        write_row(pixels + column * width, width, out + column * patch + line * width);
                    }
                }
            }
        };
        tbb::parallel_for(tbb::blocked_range<std::size_t>(0, dims[0] * rows), cut);
    }

    std::int64_t height_ = 1, width_ = 1, half_ = 0;
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
    std::make_shared<ov::OpExtension<tocom::AddLayerNorm>>(),
    std::make_shared<ov::OpExtension<tocom::CutPatches>>(),
    std::make_shared<ov::frontend::onnx::OpExtension<tocom::TokenMerge>>(
        "TokenMerge", "ai.tocom", std::map<std::string, std::string>{},
        std::map<std::string, ov::Any>{{"epsilon", 0.0f}}),
}));
