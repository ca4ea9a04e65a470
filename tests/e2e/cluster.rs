//! An engine and its listener agents as real processes over loopback, with config files in a directory of their own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::nbd::{Client, Endpoint};
use crate::plan::{self, Plan, VOLUME};
use crate::program::{self, Finished, Program};
use crate::proxy::Proxy;
use crate::scratch;
use crate::status::{self, Status};

/// How long create, status and refusals may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(90);

/// A listener agent: its place, its port, and its process while it runs.
pub struct Agent {
    pub name: String,
    pub port: u16,
    /// Where engines dial it, if not at its own port.
    pub dialled_at: Option<u16>,
    /// The Unix socket where it listens instead of the port, if it does.
    pub socket: Option<PathBuf>,
    pub data: PathBuf,
    /// Its certificates, if it has TLS.
    pub certificates: Option<PathBuf>,
    program: Option<Program>,
}

impl Agent {
    pub fn new(name: &str, data: PathBuf) -> Self {
        Self {
            name: name.to_string(),
            port: scratch::free_port(),
            dialled_at: None,
            socket: None,
            data,
            certificates: None,
            program: None,
        }
    }

    /// The directory that holds this agent's replica of the volume.
    pub fn replica(&self) -> PathBuf {
        self.data.join(VOLUME)
    }

    pub fn image(&self) -> PathBuf {
        self.replica().join("image.raw")
    }

    /// Its address if this is its port.
    fn address_at(&self, port: u16) -> String {
        match &self.socket {
            Some(path) => format!("unix:{}", path.display()),
            None => format!("127.0.0.1:{port}"),
        }
    }

    /// Starts it and waits until it says that it is ready.
    pub fn start(&mut self) {
        let mut program =
            Program::start(&format!("listener-agent {}", self.name), &program::listener_agent(), |command| {
                self.arguments(command)
            });
        let ready = format!("ready {}", self.address_at(self.port));
        program.wait_for_line(&format!("`{ready}`"), |line| line.trim() == ready);
        self.program = Some(program);
    }

    fn arguments(&self, command: &mut Command) {
        command.arg("--listen").arg(self.address_at(self.port)).arg("--data").arg(&self.data);
        if let Some(certificates) = &self.certificates {
            command.arg("--tls-certificates").arg(certificates);
        }
    }

    /// Runs it in the expectation that it refuses to start.
    pub fn start_refused(&self) -> Finished {
        let mut command = Command::new(program::listener_agent());
        self.arguments(&mut command);
        program::finish(&mut command, COMMAND_LIMIT)
    }

    pub fn process(&self) -> &Program {
        self.program.as_ref().expect("the agent is running")
    }

    pub fn kill(&mut self) {
        if let Some(program) = self.program.take() {
            program.kill();
        }
    }

    pub fn stop(&mut self) {
        if let Some(program) = self.program.take() {
            program.stop();
        }
    }
}

/// An engine with its agents. Dropping it kills them all and removes their files.
pub struct Cluster {
    pub plan: Plan,
    pub agents: Vec<Agent>,
    pub endpoint: Endpoint,
    pub admin_port: u16,
    engine: Option<Program>,
    directory: TempDir,
}

impl Cluster {
    /// Agents started, volume created, engine serving.
    pub fn serving(plan: Plan) -> Self {
        let mut cluster = Self::planned(plan);
        cluster.start_agents();
        cluster.create();
        cluster.start_engine();
        cluster
    }

    /// Directories and config only; nothing runs, nothing is formatted.
    pub fn planned(plan: Plan) -> Self {
        let directory = scratch::directory();
        let agents = (0..plan.replicas)
            .map(|index| {
                let name = String::from(char::from(b'a' + index as u8));
                let data = directory.path().join(&name);
                std::fs::create_dir(&data).expect("cannot make an agent's directory");
                Agent::new(&name, data)
            })
            .collect();
        let mut cluster = Self {
            plan,
            agents,
            endpoint: Endpoint::Tcp(scratch::free_port()),
            admin_port: scratch::free_port(),
            engine: None,
            directory,
        };
        cluster.write_config();
        if cluster.plan.tls {
            cluster.make_certificates(&[]);
            for index in 0..cluster.agents.len() {
                cluster.agents[index].certificates =
                    Some(cluster.certificates(&format!("agent-{}", cluster.agents[index].name)));
            }
        }
        cluster
    }

    /// Runs `nbdcast certs` for the config, with more words.
    pub fn make_certificates(&self, words: &[&str]) {
        let out = self.directory.path().join(plan::CERTIFICATES);
        let out = out.to_str().expect("a path in UTF-8");
        let finished = self.nbdcast(&[&["certs", "--out", out], words].concat());
        assert!(finished.status.success(), "nbdcast certs failed: {finished}");
    }

    /// Where the certificates of `holder` are.
    pub fn certificates(&self, holder: &str) -> PathBuf {
        self.directory.path().join(plan::CERTIFICATES).join(holder)
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn config(&self) -> PathBuf {
        self.directory.path().join("engine.toml")
    }

    /// Writes the config file for the plan as it is now.
    pub fn write_config(&self) {
        std::fs::write(self.config(), self.config_text()).expect("cannot write the config file");
    }

    /// The config file's text, for stories that spoil it.
    pub fn config_text(&self) -> String {
        let replicas = self
            .agents
            .iter()
            .map(|agent| {
                let port = agent.dialled_at.unwrap_or(agent.port);
                (agent.name.clone(), format!("address = \"{}\"", agent.address_at(port)))
            })
            .collect::<Vec<_>>();
        plan::config_text(&self.plan, &self.endpoint, self.admin_port, &replicas)
    }

    pub fn agent(&self, name: &str) -> &Agent {
        let found = self.agents.iter().find(|agent| agent.name == name);
        found.expect("there is an agent of that name")
    }

    pub fn agent_mut(&mut self, name: &str) -> &mut Agent {
        let found = self.agents.iter_mut().find(|agent| agent.name == name);
        found.expect("there is an agent of that name")
    }

    pub fn start_agents(&mut self) {
        for agent in &mut self.agents {
            if agent.program.is_none() {
                agent.start();
            }
        }
    }

    pub fn create(&self) {
        let finished = self.nbdcast(&["create"]);
        assert!(finished.status.success(), "nbdcast create failed: {finished}");
    }

    /// Another agent, started, that no config names yet.
    pub fn another_agent(&mut self, name: &str) {
        let data = self.directory.path().join(name);
        std::fs::create_dir(&data).expect("cannot make an agent's directory");
        let mut agent = Agent::new(name, data);
        agent.start();
        self.agents.push(agent);
    }

    /// Puts a proxy between engines and the agent `name`; before anything runs.
    pub fn proxied(&mut self, name: &str) -> Proxy {
        let agent = self.agent_mut(name);
        let proxy = Proxy::start(agent.port);
        agent.dialled_at = Some(proxy.port);
        self.write_config();
        proxy
    }

    pub fn start_engine(&mut self) {
        self.start_engine_with(&[]);
    }

    /// Starts it with further arguments and waits until it serves.
    pub fn start_engine_with(&mut self, arguments: &[&str]) {
        self.launch_engine(arguments);
        self.wait_ready();
    }

    /// Starts the engine in the expectation that it waits for replicas; returns what it says of that.
    pub fn start_engine_blocked(&mut self) -> String {
        self.launch_engine(&[]);
        let waits = format!("nbdcast: volume {VOLUME} waits to be started: ");
        let program = self.engine.as_mut().expect("the engine was just started");
        program.wait_for_line(&format!("`{waits}`"), |line| line.starts_with(&waits))
    }

    fn launch_engine(&mut self, arguments: &[&str]) {
        let config = self.config();
        self.engine = Some(Program::start("nbdcast serve", &program::nbdcast(), |command| {
            command.arg("serve").arg("--config").arg(config).args(arguments);
        }));
    }

    /// Waits until the engine that was started serves.
    pub fn wait_ready(&mut self) {
        let ready = format!("ready {}", self.uri());
        let program = self.engine.as_mut().expect("the engine is running");
        program.wait_for_line(&format!("`{ready}`"), |line| line.trim() == ready);
    }

    /// Runs `nbdcast serve` in the expectation that it refuses.
    pub fn serve_refused(&self) -> Finished {
        self.nbdcast(&["serve"])
    }

    /// Runs `nbdcast WORDS --config FILE` to its end.
    pub fn nbdcast(&self, words: &[&str]) -> Finished {
        let mut command = Command::new(program::nbdcast());
        command.args(words).arg("--config").arg(self.config());
        program::finish(&mut command, COMMAND_LIMIT)
    }

    pub fn uri(&self) -> String {
        self.endpoint.uri(VOLUME)
    }

    pub fn engine(&self) -> &Program {
        self.engine.as_ref().expect("the engine is running")
    }

    /// Whether the engine has ended by itself.
    pub fn engine_has_ended(&mut self) -> bool {
        self.engine.as_mut().is_none_or(Program::has_ended)
    }

    /// Hands over the running engine: the cluster has none from here on.
    pub fn take_engine(&mut self) -> Program {
        self.engine.take().expect("the engine is running")
    }

    pub fn kill_engine(&mut self) {
        if let Some(program) = self.engine.take() {
            program.kill();
        }
    }

    pub fn kill_agents(&mut self) {
        for agent in &mut self.agents {
            agent.kill();
        }
    }

    /// Stops the engine, then the agents, and insists that all of them end well.
    pub fn stop(&mut self) {
        if let Some(program) = self.engine.take() {
            program.stop();
        }
        for agent in &mut self.agents {
            agent.stop();
        }
    }

    pub fn connect(&self) -> Client {
        Client::connect(&self.endpoint, VOLUME).expect("cannot connect to the engine")
    }

    pub fn status(&self) -> Status {
        Status::of(&self.status_document())
    }

    /// The whole of `/status`.
    pub fn status_document(&self) -> serde_json::Value {
        let document = status::http_get(self.admin_port, "/status").expect("no answer from the admin address");
        serde_json::from_str(&document).expect("/status is not JSON")
    }

    /// Waits until `name` is a member that lacks nothing.
    pub fn wait_caught_up(&self, name: &str) {
        let limit = Duration::from_secs(60);
        scratch::wait_until(&format!("{name} has caught up"), limit, || {
            let status = self.status();
            let replica = status.replica(name);
            status.view.iter().any(|member| member == name) && replica.state == "member" && replica.lag_records == 0
        });
    }

    /// Waits until `name` is no longer in the view.
    pub fn wait_out_of_view(&self, name: &str) {
        let limit = Duration::from_secs(60);
        scratch::wait_until(&format!("{name} has left the view"), limit, || {
            !self.status().view.iter().any(|member| member == name)
        });
    }

    /// The images of the named agents, which must all be identical. Call it when nothing runs any more.
    pub fn identical_images(&self, names: &[&str]) -> Vec<u8> {
        let images = names.iter().map(|name| (*name, self.agent(name).image()));
        identical(images.collect())
    }

    pub fn names(&self) -> Vec<&str> {
        self.agents.iter().map(|agent| agent.name.as_str()).collect()
    }
}

/// Reads the images and insists that they hold the same bytes, which are returned.
pub fn identical(images: Vec<(&str, PathBuf)>) -> Vec<u8> {
    let mut contents = images.iter().map(|(name, path)| {
        let content = std::fs::read(path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
        (*name, content)
    });
    let (first_name, first) = contents.next().expect("at least one image");
    for (name, other) in contents {
        assert_eq!(first.len(), other.len(), "sizes of the images of {first_name} and {name}");
        let differing = first
            .chunks(4096)
            .zip(other.chunks(4096))
            .enumerate()
            .filter(|(_, (one, two))| one != two)
            .map(|(block, _)| block)
            .collect::<Vec<_>>();
        assert!(
            differing.is_empty(),
            "the images of {first_name} and {name} differ in {} blocks, the first of them {:?}",
            differing.len(),
            &differing[..differing.len().min(10)]
        );
    }
    first
}
