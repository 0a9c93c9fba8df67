//! Helpers as real programs: shell scripts in a directory of their own.

use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use super::*;
use crate::NoMeters;
use crate::testing::install_helper;

/// A directory with helpers, and what they wrote beside themselves.
struct Bench(TempDir);

impl Bench {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn helper(&self, suffix: &str, body: &str) -> &Self {
        install_helper(self.path(), suffix, body);
        self
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path().join(name)).unwrap_or_default()
    }

    fn helpers(&self, deadline: Duration) -> Helpers {
        self.helpers_in(format!("{}:/usr/bin:/bin", self.path().display()), deadline)
    }

    fn helpers_in(&self, path: String, deadline: Duration) -> Helpers {
        let home = Some(PathBuf::from("/home/of-test"));
        Helpers::new(HelperEnvironment { path: Some(path.into()), home, deadline }, Arc::new(NoMeters))
    }
}

const PATIENT: Duration = Duration::from_secs(60);

async fn ask(helpers: &Helpers, suffix: &str) -> Answer {
    helpers.get(suffix, "reg.example", 0, &Rejected::default()).await
}

fn found(credential: Credential) -> Answer {
    Ok(HelperAnswer::Found(HelperCredential(credential)))
}

fn trouble(answer: Answer) -> Trouble {
    answer.unwrap_err().trouble
}

#[tokio::test]
async fn t51_t64_the_server_is_on_stdin_and_home_and_path_are_set() {
    let bench = Bench::new();
    bench.helper(
        "x",
        r#"cat > stdin; echo "$1 $HOME" > env; echo '{"ServerURL":"H","Username":"u","Secret":"p"}'"#,
    );
    assert_eq!(ask(&bench.helpers(PATIENT), "x").await, found(Credential::basic("u", "p")));
    assert_eq!(
        (bench.read("stdin").as_str(), bench.read("env").as_str()),
        ("reg.example", "get /home/of-test\n")
    );
}

#[tokio::test]
async fn t54_t55_identity_tokens_and_keys_in_any_case() {
    let bench = Bench::new();
    bench.helper("t", r#"echo '{"username":"<token>","secret":"R","more":1}'"#);
    bench.helper("n", r#"echo '{"Username":"","Secret":""}'"#);
    let helpers = bench.helpers(PATIENT);
    assert_eq!(ask(&helpers, "t").await, found(Credential::IdentityToken(Secret::new("R"))));
    assert_eq!(ask(&helpers, "n").await, Ok(HelperAnswer::NotFound));
}

#[tokio::test]
async fn t09_the_known_words_mean_not_found() {
    let bench = Bench::new();
    bench.helper("none", "echo 'credentials not found in native keychain'; exit 1");
    assert_eq!(ask(&bench.helpers(PATIENT), "none").await, Ok(HelperAnswer::NotFound));
}

#[tokio::test]
async fn t10_t56_failures_are_errors_that_quote_nothing() {
    let bench = Bench::new();
    bench.helper("crash", "echo hunter2; echo hunter2 >&2; exit 2");
    bench.helper("silent", "exit 0");
    bench.helper("garbled", "echo hunter2");
    bench.helper("typed", r#"echo '{"Username":5,"Secret":"hunter2"}'"#);
    bench.helper("list", "echo '[\"hunter2\"]'");
    let helpers = bench.helpers(PATIENT);
    assert_eq!(trouble(ask(&helpers, "silent").await), Trouble::Silent);
    for suffix in ["garbled", "typed", "list"] {
        assert_eq!(trouble(ask(&helpers, suffix).await), Trouble::Garbled, "{suffix}");
    }
    let error = ask(&helpers, "crash").await.unwrap_err();
    let text = format!("{error} {error:?}");
    assert!(text.contains("docker-credential-crash: exit status: 2") && !text.contains("hunter2"), "{text}");
}

#[tokio::test]
async fn t57_a_helper_that_hangs_is_killed_with_its_children() {
    let bench = Bench::new();
    // The child keeps stdout open and says who it is.
    bench.helper("slow", "sh -c 'echo $$ > child; exec sleep 600' & echo $$ > leader; sleep 600");
    let mut deadline = Duration::from_millis(500);
    loop {
        assert_eq!(trouble(ask(&bench.helpers(deadline), "slow").await), Trouble::TimedOut(deadline));
        // On a busy machine it may be killed before it said who it is.
        if !bench.read("leader").is_empty() && !bench.read("child").is_empty() {
            break;
        }
        deadline *= 2;
    }
    for name in ["leader", "child"] {
        until_ended(&bench, name).await;
    }
}

fn process(bench: &Bench, name: &str) -> Pid {
    Pid::from_raw(bench.read(name).trim().parse().unwrap()).unwrap()
}

fn runs(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    matches!(state, Some('R' | 'S' | 'D'))
}

/// Killed children are reaped by whoever inherits them: waits until one is gone or a zombie.
async fn until_ended(bench: &Bench, name: &str) {
    let pid = process(bench, name);
    let ended = async {
        while runs(pid) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENT, ended).await.unwrap_or_else(|_| panic!("{name} still runs"));
}

#[tokio::test]
async fn what_a_helper_leaves_running_is_killed_with_its_end_but_not_a_session_of_its_own() {
    let bench = Bench::new();
    let answer = r#"echo '{"Username":"u","Secret":"p"}'"#;
    // Each says who it is before the helper answers; the second keeps stderr, as a careless script does.
    let quiet = "sleep 600 >/dev/null 2>&1 & echo $! > quiet";
    let loud = "sleep 600 >/dev/null & echo $! > loud";
    let agent = "setsid sh -c 'echo $$ > agent; exec sleep 600' >/dev/null 2>&1 &
                 while ! [ -s agent ]; do :; done";
    bench.helper("left", &[quiet, loud, agent, answer].join("\n"));
    assert_eq!(ask(&bench.helpers(PATIENT), "left").await, found(Credential::basic("u", "p")));
    until_ended(&bench, "quiet").await;
    until_ended(&bench, "loud").await;
    let agent = process(&bench, "agent");
    let stays = runs(agent);
    rustix::process::kill_process(agent, Signal::KILL).unwrap();
    assert!(stays, "a session of its own is left alone");
}

#[tokio::test]
async fn t58_a_helper_need_not_read_its_input() {
    let bench = Bench::new();
    bench.helper("deaf", r#"exec <&-; echo '{"Username":"u","Secret":"p"}'"#);
    let helpers = bench.helpers(PATIENT);
    let server = "x".repeat(1 << 20);
    let answer = helpers.get("deaf", &server, 0, &Rejected::default()).await;
    assert_eq!(answer, found(Credential::basic("u", "p")));
}

#[tokio::test]
async fn t59_a_helper_that_prints_too_much_is_killed() {
    let bench = Bench::new();
    bench.helper("loud", "yes hunter2");
    assert_eq!(trouble(ask(&bench.helpers(PATIENT), "loud").await), Trouble::TooMuch);
}

#[tokio::test]
async fn a_helper_may_complain_at_length() {
    let bench = Bench::new();
    bench.helper("wordy", r#"head -c 1000000 /dev/zero >&2; echo '{"Username":"u","Secret":"p"}'"#);
    assert_eq!(ask(&bench.helpers(PATIENT), "wordy").await, found(Credential::basic("u", "p")));
}

#[tokio::test]
async fn t60_names_and_directories_that_are_not_trusted_run_nothing() {
    let bench = Bench::new();
    bench.helper("x", "touch ran; echo '{}'");
    let here = bench.path().display().to_string();
    let helpers = bench.helpers(PATIENT);
    for suffix in ["../evil", "a/b", "", "-x", ".x", "x y", "x\0", "x;y"] {
        assert_eq!(trouble(ask(&helpers, suffix).await), Trouble::BadName, "{suffix:?}");
    }
    // Relative elements are not searched, though the helper is there.
    let up = "../".repeat(std::env::current_dir().unwrap().components().count() - 1);
    let relative = format!("{up}{}", here.trim_start_matches('/'));
    assert!(Path::new(&relative).join("docker-credential-x").is_file(), "{relative}");
    for path in [relative.clone(), format!("./{relative}"), format!("{relative}/.")] {
        let helpers = bench.helpers_in(format!("{path}:/nonexistent"), PATIENT);
        assert_eq!(trouble(ask(&helpers, "x").await), Trouble::NotInstalled, "{path}");
    }
    std::fs::set_permissions(bench.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    assert_eq!(trouble(ask(&bench.helpers_in(here.clone(), PATIENT), "x").await), Trouble::NotInstalled);
    std::fs::set_permissions(bench.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::create_dir(bench.path().join("docker-credential-dir")).unwrap();
    std::fs::write(bench.path().join("docker-credential-plain"), "#!/bin/sh\n").unwrap();
    for suffix in ["dir", "plain"] {
        assert_eq!(
            trouble(ask(&bench.helpers_in(here.clone(), PATIENT), suffix).await),
            Trouble::NotInstalled
        );
    }
    assert!(!bench.path().join("ran").exists());
}

#[test]
fn t60_nothing_is_run_from_the_working_directory() {
    const HERE: &str = "SOCI_TEST_HELPERS_ARE_HERE";
    let name = "keychain::helper::tests::t60_nothing_is_run_from_the_working_directory";
    if std::env::var_os(HERE).is_none() {
        // This test once more, by a process that works where a helper is.
        let bench = Bench::new();
        bench.helper("x", "touch ran; echo '{}'");
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(HERE, "yes")
            .current_dir(bench.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && said.contains("1 passed"), "{said}");
        assert!(!bench.path().join("ran").exists());
        return;
    }
    assert!(Path::new("docker-credential-x").is_file());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for path in ["", ":", ":/nonexistent", "/nonexistent:", "/nonexistent::/", ".", "./", "../."] {
        let environment = HelperEnvironment { path: Some(path.into()), home: None, deadline: PATIENT };
        let helpers = Helpers::new(environment, Arc::new(NoMeters));
        assert_eq!(trouble(runtime.block_on(ask(&helpers, "x"))), Trouble::NotInstalled, "{path:?}");
    }
}

#[tokio::test]
async fn t61_many_callers_share_one_run_and_its_answer_is_remembered() {
    let bench = Bench::new();
    bench.helper("x", r#"echo run >> runs; echo '{"Username":"u","Secret":"p"}'"#);
    let helpers = Arc::new(bench.helpers(PATIENT));
    let callers: Vec<_> = (0..50)
        .map(|_| {
            let helpers = Arc::clone(&helpers);
            tokio::spawn(async move { ask(&helpers, "x").await })
        })
        .collect();
    for caller in callers {
        assert_eq!(caller.await.unwrap(), found(Credential::basic("u", "p")));
    }
    ask(&helpers, "x").await.unwrap();
    assert_eq!(bench.read("runs"), "run\n");
    helpers.get("x", "reg.example", 1, &Rejected::default()).await.unwrap();
    assert_eq!(bench.read("runs"), "run\nrun\n", "another configuration is another question");
}

#[tokio::test]
async fn t62_a_refused_answer_is_asked_for_anew_at_once_then_with_pauses() {
    let bench = Bench::new();
    bench.helper("x", r#"echo run >> runs; echo "{\"Username\":\"u\",\"Secret\":\"$(cat password)\"}""#);
    let runs = || bench.read("runs").lines().count();
    std::fs::write(bench.path().join("password"), "old").unwrap();
    let helpers = bench.helpers(PATIENT);
    let mut rejected = Rejected::default();
    ask(&helpers, "x").await.unwrap();
    rejected.add(Credential::basic("u", "old").fingerprint());
    for _ in 0..20 {
        let answer = helpers.get("x", "reg.example", 0, &rejected).await;
        assert_eq!(answer, found(Credential::basic("u", "old")));
    }
    assert_eq!(runs(), 2, "the same answer again: it rests");
    let rotated = Bench::new();
    rotated.helper("x", r#"echo run >> runs; echo "{\"Username\":\"u\",\"Secret\":\"$(cat password)\"}""#);
    std::fs::write(rotated.path().join("password"), "old").unwrap();
    let helpers = rotated.helpers(PATIENT);
    ask(&helpers, "x").await.unwrap();
    std::fs::write(rotated.path().join("password"), "new").unwrap();
    let answer = helpers.get("x", "reg.example", 0, &rejected).await;
    assert_eq!(answer, found(Credential::basic("u", "new")));
    assert_eq!(helpers.get("x", "reg.example", 0, &rejected).await, answer);
    assert_eq!(rotated.read("runs"), "run\nrun\n", "a fresh answer that was not refused is remembered");
}

#[test]
fn pauses_after_refused_answers_double_to_a_minute() {
    let seconds: Vec<_> = (0..8).map(|repeats| pause(repeats).as_secs()).collect();
    assert_eq!(seconds, [0, 2, 4, 8, 16, 32, 60, 60]);
    assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
}

#[tokio::test]
async fn no_more_than_four_helpers_run_at_once() {
    let bench = Bench::new();
    bench.helper("x", r#"mkdir -p on; mkdir on/$$; ls on | wc -l >> seen; sleep 0.2; rmdir on/$$; echo '{"Username":"u","Secret":"p"}'"#);
    let helpers = Arc::new(bench.helpers(PATIENT));
    let callers: Vec<_> = (0..12)
        .map(|n| {
            let helpers = Arc::clone(&helpers);
            tokio::spawn(async move { helpers.get("x", &format!("r{n}"), 0, &Rejected::default()).await })
        })
        .collect();
    for caller in callers {
        caller.await.unwrap().unwrap();
    }
    let most = bench.read("seen").lines().map(|line| line.trim().parse::<usize>().unwrap()).max();
    assert!(most.is_some_and(|most| most <= AT_ONCE), "{most:?}");
}

#[tokio::test(start_paused = true)]
async fn only_refused_answers_are_kept_from_being_asked_for_anew() {
    let helpers = Bench::new().helpers(PATIENT);
    let key = Key { suffix: "x".into(), server: "reg.example".into(), generation: 0 };
    let answer = found(Credential::basic("u", "p"));
    let mut rejected = Rejected::default();
    // Many runs with the same good answer, as every minute brings one.
    for _ in 0..10 {
        remember(&mut helpers.memos.lock(), key.clone(), &answer, false);
    }
    assert!(matches!(helpers.remembered(&key, &rejected), Remembered::Answer(_)));
    rejected.add(Credential::basic("u", "p").fingerprint());
    assert!(matches!(helpers.remembered(&key, &rejected), Remembered::Refused));
    for seconds in [2, 4, 8] {
        remember(&mut helpers.memos.lock(), key.clone(), &answer, true);
        tokio::time::advance(Duration::from_millis(seconds * 1000 - 1)).await;
        assert!(matches!(helpers.remembered(&key, &rejected), Remembered::Answer(_)), "{seconds}");
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(matches!(helpers.remembered(&key, &rejected), Remembered::Refused), "{seconds}");
    }
    remember(&mut helpers.memos.lock(), key.clone(), &answer, false);
    tokio::time::advance(MEMO).await;
    assert!(matches!(helpers.remembered(&key, &Rejected::default()), Remembered::Nothing));
}
