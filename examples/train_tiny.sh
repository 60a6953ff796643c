#!/usr/bin/env bash
# Trains a small ARGenSeg from a bank of cut-outs to a folder that can be published: every command, in order.
#
#   bash examples/train_tiny.sh                         with the defaults below
#   BANK=bank OUT=outputs/tiny MODEL_STEPS=20000 bash examples/train_tiny.sh
#   TRAIN_OPTIONS="--use_cpu True --bf16 True" bash examples/train_tiny.sh    for all training commands
#   SCENES=66 MASKS=128 TRAIN_OPTIONS="--bf16 True" SCENE_OPTIONS="--compile_layers True --rows_multiple 64 \
#       --length_multiple 328 --dataloader_num_workers 15" bash examples/train_tiny.sh    on a GPU
#
# A stopped run goes on when the same command is given again: finished stages are skipped (delete OUT/<stage> and
# OUT/finished/<stage> to train one anew), an unfinished one goes on from its last checkpoint. `make bank` builds the bank.
set -euo pipefail

BANK=${BANK:-bank}                         # folder with sprites.parquet, backgrounds.parquet and vocabulary.json
OUT=${OUT:-outputs/tiny}                   # folder for the stages and for the model, OUT/published
TOKENIZER_STEPS=${TOKENIZER_STEPS:-3000}   # masks to tokens and back; 40 % of them without the codes, 45 % with
MODEL_STEPS=${MODEL_STEPS:-5000}           # the model that draws
LISTENING_STEPS=${LISTENING_STEPS:-2000}   # the same model again, coarse pictures only: it learns to find what is asked
WHOLE_STEPS=${WHOLE_STEPS:-5000}           # and whole pictures again
MASKS=${MASKS:-32}                         # masks in a batch
SCENES=${SCENES:-8}                        # scenes in a batch, five or six requests and up to two questions each
SAVE_STEPS=${SAVE_STEPS:-200}              # a checkpoint every so many steps
EXPRESSIONS=${EXPRESSIONS:-2000}           # test expressions to measure it on
TRAIN_OPTIONS=${TRAIN_OPTIONS:-}           # of TrainingArguments, for all training commands, such as "--bf16 True"
TOKENIZER_OPTIONS=${TOKENIZER_OPTIONS:-}   # more for train_visual_tokenizer, such as "--train_masks 50000"
SCENE_OPTIONS=${SCENE_OPTIONS:-}           # more for train_scenes, all three times, such as "--warp 0.18"
MODEL_OPTIONS=${MODEL_OPTIONS:-}           # more for the first of them, which makes the model, such as "--hidden_size 384"
PYTHON=${PYTHON:-python}

stage() { # stage NAME COMMAND...: runs the command unless it has finished before
    local name=$1
    shift
    if [[ -e $OUT/finished/$name ]]; then
        echo "== $name is finished"
        return
    fi
    echo "== $name"
    echo "   $*"
    "$@"
    mkdir -p "$OUT/finished"
    touch "$OUT/finished/$name"
}

if [[ ! -e $BANK/sprites.parquet ]]; then
    echo "error: there is no bank of cut-outs in '$BANK'; build it with \`make bank BANK=$BANK\`, or set BANK." >&2
    exit 1
fi

# shellcheck disable=SC2086  # the options are several words
stage visual_tokenizer "$PYTHON" -m trl_recipes.train_visual_tokenizer --bank "$BANK" \
    --output_dir "$OUT/visual_tokenizer" --max_steps "$TOKENIZER_STEPS" --autoencoder_steps $((TOKENIZER_STEPS * 2 / 5)) \
    --joint_steps $((TOKENIZER_STEPS * 9 / 20)) --channel_multipliers 1 2 6 12 --patch_nums 1 2 4 8 16 \
    --vocab_size 4096 --fit_pictures 4096 --rate_weight 0.03 0.03 0.03 0.025 0.015 --scale_dropout 0.1 \
    --per_device_train_batch_size "$MASKS" --learning_rate 1.2e-3 --max_grad_norm 0.2 --save_steps "$SAVE_STEPS" \
    $TRAIN_OPTIONS $TOKENIZER_OPTIONS

# shellcheck disable=SC2086
stage model "$PYTHON" -m trl_recipes.train_scenes --bank "$BANK" --visual_tokenizer "$OUT/visual_tokenizer" \
    --output_dir "$OUT/model" --max_steps "$MODEL_STEPS" --expressions_per_scene 5 --visual_loss_weight 0.4 \
    --schedule easy easy+medium medium+full full+medium+full+easy full+medium+full+easy full+medium+full+easy \
    --per_device_train_batch_size "$SCENES" --learning_rate 2e-3 --weight_decay 0.05 --warmup_steps 100 \
    --save_steps "$SAVE_STEPS" $TRAIN_OPTIONS $SCENE_OPTIONS $MODEL_OPTIONS

# shellcheck disable=SC2086
stage listening "$PYTHON" -m trl_recipes.train_scenes --bank "$BANK" --visual_tokenizer "$OUT/visual_tokenizer" \
    --start_from "$OUT/model" --output_dir "$OUT/listening" --max_steps "$LISTENING_STEPS" --schedule names+full \
    --num_scales 4 --slips 1 --mask_region_weight 3 --freeze_vision True --freeze_trunk True --visual_loss_weight 0.4 \
    --expressions_per_scene 6 --per_device_train_batch_size "$SCENES" --learning_rate 2e-3 --weight_decay 0.05 \
    --warmup_steps 50 --save_steps "$SAVE_STEPS" $TRAIN_OPTIONS $SCENE_OPTIONS

# shellcheck disable=SC2086
stage whole "$PYTHON" -m trl_recipes.train_scenes --bank "$BANK" --visual_tokenizer "$OUT/visual_tokenizer" \
    --start_from "$OUT/listening" --output_dir "$OUT/whole" --max_steps "$WHOLE_STEPS" \
    --schedule full+names+full+medium+full+easy --slips 0.3 --mask_region_weight 1 --freeze_trunk True \
    --expressions_per_scene 6 --per_device_train_batch_size "$SCENES" --learning_rate 2e-3 --weight_decay 0.05 \
    --warmup_steps 50 --save_steps "$SAVE_STEPS" $TRAIN_OPTIONS $SCENE_OPTIONS

stage published "$PYTHON" -m trl_recipes.export --model "$OUT/whole" --output "$OUT/published" \
    --picture-logit-adjustment 0.55

stage scores "$PYTHON" -m trl_recipes.evaluate --model "$OUT/published" --task scenes --data "$BANK" \
    --option expressions="$EXPRESSIONS" --output "$OUT/scores"
