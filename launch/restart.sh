# shellcheck shell=bash
# Whether a run that ended is started again. Sourced by the launchers; needs bash.
#
#   decide STATUS WORKDIR STARTS NOTE
#
# prints "done", "again" or "stop" for the exit status of `sdv train`: 0 is done, 2 (wrong input) stops, and 75 (stopped
# by a signal, after a checkpoint) goes on. All else, a disk that failed (74), a lost process (76) or a crash, goes on too,
# until STARTS starts in a row have ended at the same checkpoint. NOTE is the file that counts them.

newest_checkpoint() {
    local folder newest=0
    for folder in "$1"/checkpoints/*; do
        [[ ${folder##*/} =~ ^[0-9]+$ ]] && ((${folder##*/} > newest)) && newest=${folder##*/}
    done
    echo "$newest"
}

decide() {
    local status=$1 workdir=$2 starts=$3 note=$4 newest at=-1 count=0
    case $status in
    0) echo "done" ;;
    2) echo stop ;;
    75) echo again ;;
    *)
        newest=$(newest_checkpoint "$workdir")
        [[ -e $note ]] && read -r at count <"$note"
        ((at == newest)) || count=0
        echo "$newest $((count + 1))" >"$note"
        if ((count + 1 < starts)); then echo again; else echo stop; fi
        ;;
    esac
}
