"""What of transformers' and PyTorch's inside we touch, and why. `tests/test_compat.py` checks every entry."""

# Private attributes of `transformers.Trainer` that we override or read: name -> (parameters that we rely on, why).
PRIVATE_API: dict[str, tuple[tuple[str, ...], str]] = {
    "_run_epoch": (
        ("epoch", "train_dataloader", "resume_from_checkpoint", "epochs_trained", "steps_trained_in_current_epoch"),
        "One window is one step of the upstream loop, so it must read gradient_accumulation_steps as 1. Overridden "
        "to show it that (every callback and hook inside sees the user's value again), and to note the random state "
        "at the start of an epoch.",
    ),
    "_init_training_state": (
        ("max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"),
        "Returns (epochs, micro-batches) to skip on resume, computed as global_step times k: replaced by the saved "
        "cursor.",
    ),
    "_save_checkpoint": (("model", "trial"), "The accumulation state is part of every checkpoint."),
    "_get_output_dir": (("trial",), "Where that checkpoint lies: trials of a hyperparameter search have their own."),
    "_track_num_input_tokens": (("inputs",), "Counts tokens of a batch: called for each micro-batch of a window."),
    "_loss_shifts_labels": (
        None,
        "Whether num_items_in_batch counts labels[..., 1:]; the items of single micro-batches are counted likewise.",
    ),
    "_defer_fsdp_gradient_reduction": (
        (),
        "`no_sync` of a model sharded at load time: windows leave out the reduction as the upstream loop does.",
    ),
    "_train_batch_size": (None, "Samples in a micro-batch, for `rank_batch_size`."),
    "_clip_grad_norm": (("model",), "Its result says whether the gradients of a window are finite."),
    "_get_grad_norm": (("model", "grad_norm"), "As above, where nothing is clipped."),
    "_finalize_training": (("trial",), "A save that failed is tried once more before the run is over."),
    "_save_optimizer_and_scheduler": (("output_dir",), "A part of a save: one that fails leaves the others out."),
    "_save_scaler": (("output_dir",), "As above."),
    "_save_rng_state": (("output_dir",), "As above."),
    "_load_rng_state": (("checkpoint",), "Called too late where the rows of the data draw random numbers."),
    "_push_from_checkpoint": (("checkpoint_folder",), "Waits until the checkpoint is complete."),
    "_prepare_inputs": (("inputs",), "Moves a batch to the device where its loss is tried before the first step."),
    "_load_scaler": (("checkpoint",), "Fails on a checkpoint of fp16 in a run that has no gradient scaler."),
}

# Private names of PyTorch (and those of transformers outside `Trainer`) that the package imports or reads: module or
# class -> name -> (parameters, why).
PRIVATE_TORCH: dict[str, dict[str, tuple[tuple[str, ...] | None, str]]] = {
    "transformers.masking_utils": {
        "find_packed_sequence_indices": (
            ("position_ids",),
            "Looks at values, which fake tensors lack; replaced during a replay by what it finds in most batches.",
        ),
        "is_tracing": (
            ("tensor",),
            "Says that fake tensors have no values; replaced where a replay knows those of an attention mask.",
        ),
    },
    "transformers.initialization": {
        "no_init_weights": ((), "Builds models of any size at once for `hf-trainopt plan`."),
        "meta_device_safe_creation_ops": ((), "Builds models on the meta device, as from_pretrained does."),
    },
    "torch": {
        "_check_tensor_all_with": (None, "Assertions on values (image tokens of LLaVA); replaced during a replay."),
    },
    "torch._subclasses.fake_tensor": {
        "FakeTensorMode": (("allow_non_fake_inputs",), "Runs a step without memory."),
        "FakeTensor": (
            ("fake_mode", "elem", "device"),
            "Recognised, and asked for `fake_device` and `fake_mode`.",
        ),
        "DataDependentOutputException": (None, "Raised where an operator looks at values: errors say so."),
        "DynamicOutputShapeException": (None, "Raised where the shape of an output depends on values."),
    },
    "torch._C": {
        "_ExcludeDispatchKeyGuard": (None, "Calls an operator beneath autocast."),
        "_SetExcludeDispatchKeyGuard": (None, "Detaches a saved output such that it shares the version counter."),
        "DispatchKey": (None, "Names autocast of the CPU."),
        "DispatchKeySet": (None, "As above."),
        "_current_graph_task_id": (None, "-1 outside a backward pass: tells a recomputation from a forward pass."),
    },
    "torch.autograd.Variable": {
        "_execution_engine": (None, "Reads gradients at the end of a backward pass, before they are clipped."),
    },
    "torch.utils.checkpoint": {
        "_CheckpointFrame": ((), "Replaced while a model is looked at, to see whether it checkpoints by itself."),
    },
    "torch.utils._python_dispatch": {
        "_disable_current_modes": ((), "Compares activation functions on real numbers while tensors are fake."),
        "TorchDispatchMode": ((), "Public in all but its module: sees the operators of selective recomputation."),
        "is_in_torch_dispatch_mode": ((), "Two modes that are not left in reverse order upset each other."),
        "_get_current_dispatch_mode": ((), "As above."),
    },
    "torch.utils._pytree": {
        "tree_flatten": (("tree",), "Takes arguments apart into tensors and the rest, ModelOutput included."),
        "tree_unflatten": (("leaves", "treespec"), "Puts them together again."),
        "tree_leaves": (("tree",), "Finds the tensors in what a stage returns."),
        "tree_map": (("func", "tree"), "Saves and returns the tensors in what an operator returns."),
    },
    "torch._C._dynamo.eval_frame": {
        "get_eval_frame_callback": (None, "Whether torch.compile runs around us, between two compiled pieces."),
    },
    "torch._dynamo": {"OptimizedModule": (None, "What torch.compile makes of a module, to refuse it.")},
    "torch.nn.Module": {
        "_buffers": (None, "Buffers are replaced during a recomputation, and put back."),
        "_parameters": (None, "Parameters of a copy are made fake, ties between them kept."),
        "_compiled_call_impl": (None, "What Module.compile leaves on a module, to refuse it."),
        "_modules": (None, "Where a compiled module holds the original one, as `_orig_mod`."),
    },
}

# Private names that not all supported versions have: name -> (package, first version, first version without it).
VERSIONS: dict[str, tuple[str, str | None, str | None]] = {
    "_defer_fsdp_gradient_reduction": ("transformers", "5.23", None),
}

# What a change of precision in a run reads and sets on objects of Accelerate and PyTorch: class -> name -> why.
PRIVATE_PRECISION: dict[str, dict[str, str]] = {
    "accelerate.state.AcceleratorState": {"_mixed_precision": "The precision; there is no setter."},
    "accelerate.optimizer.AcceleratedOptimizer": {
        "scaler": "Taken out, so that steps are plain.",
        "_is_overflow": "Whether the last step was skipped; stays as it is once there is no scaler.",
    },
    "accelerate.accelerator.Accelerator": {
        "scaler": "Taken out, and put back for another run.",
        "native_amp": "Whether it unscales gradients and casts.",
        "_is_accelerate_prepared": "Left on a model that was prepared, which is then not prepared again.",
    },
    "accelerate.utils.operations.ConvertOutputsToFp32": {
        "model_forward": "Marks an autocast context around `model.forward`, and leads to it.",
    },
    "torch.autocast": {"_enabled": "Switches a context off.", "fast_dtype": "The type that it casts to."},
}

# Private names of PyTorch's DDP that are called where gradients are averaged without it: name -> why.
PRIVATE_DDP: dict[str, str] = {
    "_sync_buffers": "The broadcast of buffers, which else is part of the first forward pass of a window.",
}

# What is read of a model that `fully_shard` has taken apart, and of what Accelerate will do to one: name -> why.
PRIVATE_FSDP2: dict[str, str] = {
    "_get_fsdp_state": "The state of a module, whose groups a plan's replay follows.",
    "_fsdp_param_groups": "Those groups: modules, parameters, types, whether they are kept after the forward pass.",
    "_fsdp_param_group": "The same in PyTorch 2.11, where a state has one.",
    "_auto_reshard_after_forward": "Whether PyTorch decides to keep the root whole, when it runs first.",
    "_module_info": "Which module has a parameter, by which name.",
    "_find_final_norm": "Accelerate's: the last norm is gathered together with the head.",
}
